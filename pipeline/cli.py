"""The command `matryoshka`. Results go to stdout, progress and logs to stderr; the only module that prints."""

import errno
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import polars as pl
import typer

from pipeline import corpus, ledger, lock, plan, querylog, standing, stopping, submit, verify
from pipeline.bucket import is_of_a_store, located
from pipeline.cascade import Level
from pipeline.errors import DamageError, PipelineError, SpecError
from pipeline.run import Stage, check, run as run_job
from pipeline.search import Index, open_index
from pipeline.sentences import masked
from pipeline.spec import JobSpec
from pipeline.storage import Root
from pipeline.terminal import (
    configure_logging,
    err,
    me,
    out,
    plain,
    print_evaluation,
    print_findings,
    print_hits,
    print_json,
    print_log,
    print_output,
    print_plan,
    print_steps,
    print_summary,
    print_training,
    watched,
)
from pipeline.training import output, run as training
from pipeline.training.spec import TrainSpec

log = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Job = Annotated[str, typer.Argument(help="path to a job spec")]
JobOrRoot = Annotated[str, typer.Argument(help="path to a job spec, or a finished root")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="path.to.field=value; repeatable")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]

UsageError: Any = typer.BadParameter.__base__
"""A call that does not parse; typer has it from click, or from a copy of its own."""
WARN_SCAN_ROWS = 1_000_000
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}


def main() -> NoReturn:
    """Run the command line; every PipelineError becomes one sentence and its exit code."""
    try:
        with stopping.listening(_last_words):
            app(standalone_mode=False)
    except UsageError as error:
        message = error.format_message().replace("Value error, ", "").replace("Input should", "must").rstrip(".")
        sys.exit(_fail(f"{message}; see {me()} --help", 2))
    except PipelineError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except (stopping.Stopped, SystemError) as error:  # Ray's wait may wrap what a signal raised in it
        stop = error if isinstance(error, stopping.Stopped) else error.__cause__ or error.__context__
        if not isinstance(stop, stopping.Stopped):
            raise
        _last_words(stop.args[0])
        sys.exit(128 + stop.args[0])
    except (OSError, RuntimeError, ValueError) as error:
        if is_of_a_store(error):
            sys.exit(_fail(f"the object store failed: {str(error).splitlines()[0][:300]}; run again", 1))
        if not isinstance(error, OSError):
            raise
        if error.errno not in DISK_ERRORS and "No space left" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        sys.exit(_fail(f"the disk failed: {reason}; make room and run again, what is finished is kept", 1))
    sys.exit(0)


def _last_words(number: int) -> None:
    _fail("interrupted; run the same command to go on from what is finished", 128 + number)


def _fail(sentence: str, code: int) -> int:
    err.print(f"[bold red]error:[/] {plain(masked(sentence))}", soft_wrap=True)
    return code


@app.command("run")
def run_command(
    job: Job,
    sets: Sets = None,
    first: Annotated[Stage, typer.Option("--from")] = "corpus",
    last: Annotated[Stage, typer.Option("--until")] = "report",
    as_json: AsJson = False,
) -> None:
    """Run all stages; finished ones are skipped."""
    spec = JobSpec.load(job, sets or ())
    before = ledger.newest_generation(located(spec.root))
    with watched() as bars:
        generation = run_job(spec, first, last, bars)
    if as_json:
        print_json(generation)
    elif not generation:
        out.print(f"Stopped after {last}, as asked. To go on: {plain(me())} run {plain(job)}")
    else:
        is_new = before is None or before["generation"] != generation["generation"]
        if not is_new:
            out.print(f"Nothing left to do: generation {generation['generation']} of {plain(spec.root)} is up to date.")
        root = located(spec.root)
        print_summary(spec.name, str(root.path), generation)
        print_evaluation(pl.read_parquet(root.local("evaluation.parquet"), glob=False))
        if is_new:
            _examples(spec, generation)
        _next(spec, job)


@app.command("submit")
def submit_command(
    job: Job,
    sets: Sets = None,
    address: Annotated[
        str | None, typer.Option(help="http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, this machine")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="a variable's name, passed with its value; repeatable")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the job to its end")] = True,
) -> None:
    """Send the run to a Ray cluster, tell what it tells, end with its exit code."""
    configure_logging(None)
    spec = JobSpec.load(job, sets or ())
    for sentence in submit.check(spec):
        err.print(f"[yellow]warning:[/] {plain(sentence)}", soft_wrap=True)
    sent = submit.submit(job, spec, sets or (), address, submit.environment(env or ()))
    if not wait:
        out.print(f"{plain(sent.id)}\n{plain(sent.hint)}")
        return
    err.print(f"submitted {plain(sent.id)}", soft_wrap=True)
    try:
        sys.exit(sent.follow(print_output))
    except stopping.Stopped as stop:
        err.print(f"{plain(sent.id)} goes on without this command; {plain(sent.hint)}", soft_wrap=True)
        sys.exit(128 + stop.args[0])


@app.command()
def validate(job: Job, sets: Sets = None, as_json: AsJson = False) -> None:
    """Check the spec and that inputs can be read; starts no model."""
    configure_logging(None)
    spec = JobSpec.load(job, sets or ())
    folder = check(spec)
    files = corpus.check(spec.corpus)
    rows = corpus.known_rows(files)
    if as_json:
        print_json({"valid": True, "files": len(files), "rows": rows, "model": folder.name})
    else:
        size = "rows not known yet" if rows is None else f"{rows:,} rows"
        out.print(f"{plain(job)} is valid: {len(files)} corpus file(s), {size}, model {plain(folder.name)}")
    if rows is not None and rows > WARN_SCAN_ROWS and "_int8" in _first_table(spec):
        err.print(
            f"[yellow]warning:[/] {_first_table(spec)} comes first in the cascade and LanceDB cannot index int8, "
            f"so each query scans all {rows:,} rows; begin with a binary or float16 table",
            soft_wrap=True,
        )


def _first_table(spec: JobSpec) -> str:
    if spec.search.cascade:
        return spec.search.cascade[0].table
    return spec.smallest.table


@app.command("plan")
def plan_command(
    job: Job,
    sets: Sets = None,
    price: Annotated[float | None, typer.Option(help="money per hour of a machine like this one")] = None,
    as_json: AsJson = False,
) -> None:
    """Sample the corpus: rows, tokens, time, money, bytes and memory, before anything is spent."""
    configure_logging(None)
    made = plan.run(JobSpec.load(job, sets or ()), price)
    if as_json:
        print_json(made.to_json())
    else:
        print_plan(made)


@app.command()
def status(job: JobOrRoot, sets: Sets = None, as_json: AsJson = False) -> None:
    """Tell what is done, what is left and what was quarantined, from storage alone."""
    root, _ = _root_and_spec(job, sets)
    facts = standing.run(root)
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        out.print(f"{name:12} {plain(str(value))}")


@app.command("verify")
def verify_command(job: JobOrRoot, sets: Sets = None, as_json: AsJson = False) -> None:
    """Check everything written, from the files alone, by code that shares nothing with what writes."""
    configure_logging(None)
    root, _ = _root_and_spec(job, sets)
    found = verify.run(root.path)
    if as_json:
        out.print_json(data={"whole": found.is_whole, **vars(found)})
    else:
        print_findings(str(root.path), found)
    if found.damaged:
        raise DamageError(
            f"{root.path}: {len(found.damaged)} damaged file(s), the first is {found.damaged[0]}; "
            "run the job again to mend what can be made again"
        )
    if not found.is_whole:
        raise DamageError(
            f"{root.path}: {len(found.problems)} problem(s), the first: {found.problems[0]}; every file is as it was "
            "written, so run the job in another root"
        )


@app.command()
def search(
    job: JobOrRoot,
    text: str,
    k: Annotated[int, typer.Option("-k", help="how many hits")] = 10,
    where: Annotated[str | None, typer.Option(help="filter, for example \"lang = 'en'\"")] = None,
    sets: Sets = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per line")] = False,
    explain: Annotated[bool, typer.Option(help="tell what each level did")] = False,
    exact: Annotated[bool, typer.Option(help="search the full vectors of every row")] = False,
    similar: Annotated[bool, typer.Option(help="TEXT is the id of a row; find those like it")] = False,
    deadline_ms: Annotated[float | None, typer.Option(help="the best answer after so many milliseconds")] = None,
    hybrid: Annotated[
        bool | None, typer.Option("--hybrid/--no-hybrid", help="fuse with the full-text index; default: as in the spec")
    ] = None,
) -> None:
    """Two-pass search."""
    configure_logging(None)
    if exact and hybrid:
        raise SpecError("--exact and --hybrid exclude each other: hybrid search has another order")
    root, spec = _root_and_spec(job, sets)
    engine, stop = (None, None) if spec is None else (spec.search.engine, spec.search.stop)
    index = open_index(str(root.path), _model_folder(spec), engine=engine)
    if exact or (hybrid is None and spec is not None and deadline_ms is None):
        hybrid = spec is not None and spec.search.hybrid and not exact
    cascade = [] if exact else _cascade(spec, index, k)
    if explain:
        _explain(index.explain(text, k, where, cascade, stop, deadline_ms, hybrid), as_json)
        return
    if similar:
        hits = index.similar(text, k, where, cascade)
    else:
        hits = index.search(text, k, where, cascade, stop=stop, deadline_ms=deadline_ms, hybrid=hybrid)
    if as_json:
        for hit in hits.iter_rows(named=True):
            print_json(hit, None)
        return
    if not len(hits):
        out.print("no hit")
    print_hits(hits)


def _model_folder(spec: JobSpec | None) -> str | None:
    """The spec's model where it is a folder, which may have moved since the tables were made."""
    return spec.model.name if spec is not None and Path(spec.model.name).expanduser().is_dir() else None


def _cascade(spec: JobSpec | None, index: Index, k: int) -> list[Level] | None:
    """The spec's cascade where there is a spec; None leaves it to the index."""
    if spec is None or k < 1:
        return None
    levels = spec.search.cascade
    if levels is None:
        return index.opened.default_cascade(k)
    return [(level.table, level.shortlist, level.how) for level in levels]


def _explain(steps: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for step in steps:
            print_json(step, None)
        return
    print_steps(steps)


@app.command()
def evaluate(
    job: Job,
    sets: Sets = None,
    as_json: AsJson = False,
    queries: Annotated[
        str | None, typer.Option(help="measure the published cascade on this file (_id, text); adds to the query log")
    ] = None,
) -> None:
    """Measure recall and nDCG of every table and the cascade again."""
    spec = JobSpec.load(job, sets or ())
    if queries is not None:
        _log_queries(spec, queries, as_json)
        return
    with watched() as bars:
        run_job(spec, "evaluate", "report", bars)
    measured = pl.read_parquet(located(spec.root).local("evaluation.parquet"), glob=False)
    if as_json:
        sys.stdout.write(measured.write_ndjson())
    else:
        print_evaluation(measured, whole=True)


def _log_queries(spec: JobSpec, path: str, as_json: bool) -> None:
    configure_logging(None)
    root = located(spec.root)
    index = open_index(str(root.path), model=_model_folder(spec))
    with lock.lock(root) as held:
        measured = querylog.run(path, index, spec.evaluate.k, spec.seed, held)
    if as_json:
        print_json(json.loads(measured[-1:].write_ndjson()), None)
        return
    print_log(measured)


@app.command("report")
def report_command(job: JobOrRoot, sets: Sets = None, as_json: AsJson = False) -> None:
    """Make one self-contained HTML page of the newest generation, or of a trained model's folder, from files alone."""
    from pipeline import report  # late, as in run
    from pipeline.training import page

    configure_logging(None)
    if (folder := Path(job).absolute()).joinpath(output.RECORD).is_file():
        path, size = page.write(folder, folder)
    else:
        root, _ = _root_and_spec(job, sets)
        path = str(report.run(root))
        size = root.size(report.FILE) or 0
    if as_json:
        print_json({"report": path})
    else:
        out.print(f"{plain(path)}: {size / 1e6:.1f} MB, opens in any browser without a network")


@app.command("train")
def train_command(
    job: Annotated[str, typer.Argument(help="path to a training spec")], sets: Sets = None, as_json: AsJson = False
) -> None:
    """Train a Matryoshka model; what is done is gone on with."""
    with watched() as bars:
        record, is_new = training.run(TrainSpec.load(job, sets or ()), bars)
    if as_json:
        print_json(record)
    else:
        print_training(record, is_new)


@app.command()
def schema(train: Annotated[bool, typer.Option("--train", help="of a training instead")] = False) -> None:
    """Print the JSON Schema of a job."""
    sys.stdout.write(schema_text(TrainSpec if train else JobSpec))


def schema_text(spec: type[JobSpec] | type[TrainSpec] = JobSpec) -> str:
    """The JSON Schema of a spec, as it is kept in schemas/."""
    return json.dumps(spec.model_json_schema(), indent=2, sort_keys=True) + "\n"


def _root_and_spec(job: str, sets: list[str] | None) -> tuple[Root, JobSpec | None]:
    if "://" in job or Path(job).is_dir():
        if sets:
            raise SpecError(f"--set changes a spec; {job} is a root")
        return located(job), None
    spec = JobSpec.load(job, sets or ())
    return located(spec.root), spec


def _examples(spec: JobSpec, generation: dict[str, Any]) -> None:
    if spec.search.examples:
        index = Index(located(spec.root), generation)
        for text in spec.search.examples:
            out.print(f"\n{plain(text)}", style="bold")
            print_hits(index.search(text, k=3))


def _next(spec: JobSpec, job: str) -> None:
    text = spec.search.examples[0] if spec.search.examples else "your question"
    from pipeline import report  # late, as in run

    root = located(spec.root)
    page = f"\nThe page of this run: {plain(str(root / report.FILE))}" if root.size(report.FILE) else ""
    out.print(f"{page}\nNext:")
    out.print(f'  {plain(me())} search {plain(job)} "{plain(text)}" -k 5 --explain')
    out.print(f"  {plain(me())} status {plain(job)}")
    out.print(f"  {plain(me())} evaluate {plain(job)}")
