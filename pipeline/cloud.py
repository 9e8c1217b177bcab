"""Where object stores are and who asks: from the environment alone, completed where the libraries look for it.

This project, Lance and LanceDB read the same variables; pyarrow, which reads a corpus, is told what they say.
"""

import configparser
import os
from pathlib import Path
from typing import Any

from pipeline.errors import SpecError

RETRIES, BACKOFF, MAX_BACKOFF = 10, 0.02, 5.0
"""Seconds between two tries: from BACKOFF up, doubled and drawn at random, at most MAX_BACKOFF."""
SECONDS = 120
"""After so long nothing is tried again."""
CONNECT_SECONDS, READ_SECONDS = 5, 20
"""How long a connection may take, and how long one may be silent."""
SETTINGS = {
    "AWS_CONNECT_TIMEOUT": f"{CONNECT_SECONDS}s", "AWS_READ_TIMEOUT": f"{READ_SECONDS}s", "AWS_TIMEOUT": "300s",
    "OBJECT_STORE_CLIENT_MAX_RETRIES": str(RETRIES), "OBJECT_STORE_CLIENT_RETRY_TIMEOUT": str(SECONDS),
}  # fmt: skip
"""Bounds of a request, for this module and for Lance, unless the environment has others."""
PROFILE = {
    "aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "aws_session_token": "AWS_SESSION_TOKEN", "region": "AWS_REGION", "endpoint_url": "AWS_ENDPOINT_URL",
}  # fmt: skip
ELSEWHERE = {
    "gs": ("GOOGLE_", "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": ("AZURE_", "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY"),
}
"""How the variables of other stores begin, and the usual ones."""
OTHERS = (
    "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)  # fmt: skip
"""Other credentials that the environment may name."""


def environment(scheme: str) -> None:
    """Complete this process' environment, where the libraries look: bounds, a profile's keys, leave for plain HTTP.

    SpecError where it has no credentials for this kind of store.
    """
    if scheme == "s3":
        _s3()
    elif not any(name.startswith(ELSEWHERE[scheme][0]) for name in os.environ):
        raise SpecError(f"{scheme}:// needs credentials in the environment: {ELSEWHERE[scheme][1]}")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def options(scheme: str) -> dict[str, Any]:
    """The bounds of a request and the leave for plain HTTP, as options of an HTTP client."""
    found: dict[str, Any] = {name[4:].lower(): os.environ[name] for name in SETTINGS if name.startswith("AWS_")}
    return found | ({"allow_http": True} if scheme == "s3" and os.environ.get("AWS_ALLOW_HTTP") == "true" else {})


def _s3() -> None:
    if not os.environ.get("AWS_ACCESS_KEY_ID"):
        _take_profile()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint and not endpoint.startswith(("https://", "http://")):
        raise SpecError(f"AWS_ENDPOINT_URL is {endpoint!r}; it begins with https:// or http://")
    if endpoint:
        os.environ["AWS_ENDPOINT_URL"] = endpoint  # the one name that Lance knows
    if endpoint.startswith("http://"):
        os.environ["AWS_ALLOW_HTTP"] = "true"


def arrow_s3() -> Any:
    """S3 for pyarrow, at the endpoint that the environment or its profile names; None where they name none."""
    from pyarrow import fs

    if any(os.environ.get(name) for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")):
        environment("s3")
    scheme, _, host = os.environ.get("AWS_ENDPOINT_URL", "").partition("://")
    if not host:
        return None
    return fs.S3FileSystem(
        scheme=scheme,
        endpoint_override=host.rstrip("/"),
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        connect_timeout=CONNECT_SECONDS,
        request_timeout=READ_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=RETRIES),
    )


def _take_profile() -> None:
    """Put the keys of AWS_PROFILE into the environment: neither library reads the shared files."""
    profile = os.environ.get("AWS_PROFILE")
    if not profile:
        if not any(os.environ.get(name) for name in OTHERS):
            raise SpecError(
                "s3:// needs credentials in the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        return
    files = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
    found: dict[str, str] = {}
    for name, usual in files.items():
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(os.environ.get(name, usual)).expanduser())
        except configparser.Error:
            raise SpecError(
                f"AWS_PROFILE: {os.environ.get(name, usual)} cannot be read as a list of profiles"
            ) from None
        for section in (profile, f"profile {profile}"):
            found |= dict(parser[section]) if parser.has_section(section) else {}
    if "aws_access_key_id" not in found or "aws_secret_access_key" not in found:
        raise SpecError(
            f"AWS_PROFILE: profile {profile!r} holds no access key; for SSO and roles put what `aws configure "
            "export-credentials --format env` prints into the environment"
        )
    for name, variable in PROFILE.items():
        if name in found:
            os.environ.setdefault(variable, found[name])
