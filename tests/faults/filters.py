"""`where` against a second reading of its grammar, in plain Python: `python -m tests.faults.filters --count 10000`.

Each string is refused by `pipeline.filters.rebuild`, or Lance returns the rows that the reference does. A string that
is accepted outside the grammar is a violation. String number n of a seed is the same in every run: `--only n`.
"""

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lance
import numpy as np

from pipeline.errors import QueryError
from pipeline.filters import rebuild
from tests.faults.where import COLUMNS, TYPES, WORDS, Reading, Refused, stored

BARE = {"lang", "select", "year", "small", "Big", "ratio", "thin", "half", "ok"}
"""Names that need no quotes; `NOT` does."""
NUMBERS = [
    "-128", "127", "128", "-129", "255", "256", "-1", "0", "-0", "1", "2001", "-3", ".5", "1.", "-.5", "0.1", "-2.5",
    "1e0", "1E+3", "2e-3", "1e16", "1e22", "2000.5", "2001.0", "2001.0000000000000000001", "9007199254740993",
    "9007199254740992.5", "9223372036854775806", "9223372036854775807", "9223372036854775808", "-9223372036854775807",
    "-9223372036854775808", "-9223372036854775809", "-9223372036854775808.0", "18446744073709551615", "1e19", "-1e19",
    "18446744073709551616", "65504", "65519", "65520", "-65520", "7e4", "16777217", "3.4028235e38", "3.5e38", "-1e300",
    "1.7e308", "1e308", "1e309", "1e999", "5e-324", "1e-999", "1e-99999999999999999999",
]  # fmt: skip
PATTERNS = [
    "%", "%%", "_", "__", "a%", "%b", "%a%", "a_b", "a\\_b", "a\\\\b", "a\\b", "\\", "a\\", "%\\", "\\%", "5\\%",
    "50\\%", "%\\_%", "e_", "E%", "", "it's", "a%b%", "%\n%", "\x00", "%日_", "_\\", "\\\\", "a\\\\", "%\\\\%",
]  # fmt: skip


def quoted(text: str) -> str:
    """A string literal."""
    return "'" + text.replace("'", "''") + "'"


CLASSIC = [
    "' OR 1=1 --", "lang = '' OR 1=1 --", "lang = '' OR '1'='1'", "lang = 'x'; DROP TABLE documents", "'; DROP",
    "lang = 'en' --", "lang = 'en' -- '", "lang = 'en' /* x */", "lang /**/ = 'en'", "/* */ ok", "ok --", "ok;", "ok#",
    "lang = ‘en’", "lang = ’en’", "lang = “en”", "lang = ＇en＇", "lang = 'it\\'s'", "lang = 'a\\' OR ok --'",
    "lang = '\\'", "lang = 'a\\b'", "lang = '\x00'", "lang = 'a\x00b'", "ok\x00", "\x00ok", "lang = '\ud800'",
    *(f"{name} {sign} {number}" for name in ("year", "Big", "ratio", "thin", "half") for sign in ("=", "<") for number
      in ("1e999", "-0", ".5", "1.", "0x10", "1_000", "1e", "--1", "+1", "1..", ".", "-", "١", "１", "1e1.5", "1f",
          "NaN", "inf", "9" * 40, "9" * 5000, "0" * 5000 + "1", "1e-99999999999999999999", "1e99999999999999999999")),
    *("(" * depth + "ok" + ")" * depth for depth in (20, 21, 200, 5000)),
    *("NOT " * depth + "ok" for depth in (20, 21, 200, 5000)),
    "(" * 200 + "ok", "ok" + ")" * 200,
    " OR ".join(f"year = {number}" for number in range(900)), " AND ".join(["year != 5"] * 2000),
    " OR ".join(["ok"] * 100_000), f"year IN ({', '.join(map(str, range(-3, 100_000)))})",
    f"lang NOT IN ({', '.join(quoted(str(number)) for number in range(100_000))})",
    f"ratio IN ({','.join(['1e999'] * 100_000)})", f"small NOT IN ({','.join(map(str, range(100_000)))})",
    f"thin IN ({','.join(f'{number}.1' for number in range(100_000))})",
    "it's a name = 'x'", "`it's a name` = 'x'", '"it\'s a name" = \'y\'\'\'', "[lang] = 'en'", "lang.x = 'en'",
    "t.lang = 'en'", "`NOT` = 1", "NOT = 1", "NOT `NOT` = 1", "not not `NOT` != 1", '"NOT"IN(1)', "select = 'in'",
    "`select` = 'not'", "LANG = 'en'", "`LANG` = 'en'", "big = 1", "Big = 1", "``= 1", '"" = 1', "`lang`` = 'x'",
    "length(lang) = 2", "lower(lang) = 'en'", "lang = lower('EN')", "lang IN (SELECT 1)", "lang = (SELECT 'en')",
    "EXISTS (SELECT 1)", "CAST(year AS STRING) = '1'", "year::text = '1'", "lang ~ 'e'", "lang !~ 'e'",
    "lang || 'x' = 'enx'", "ok IS TRUE", "ok IS NOT FALSE", "ok IS UNKNOWN", "NOT ok IS NULL", "ok = NULL",
    "ok IS NOT NOT NULL", "NULL", "true", "TRUE", "1", "1=1", "'a' = 'a'", "lang = year", "year + 1 = 2", "-year = 3",
    "year BETWEEN 0 AND 3", "year <=> 1", "lang ILIKE 'EN'", "lang SIMILAR TO 'en'", "lang RLIKE 'e'",
    "lang LIKE 'e' ESCAPE 'n'", "lang = E'\\n'", "lang = N'en'", "lang = X'656e'", "lang = $$en$$", "lang = U&'en'",
    "lang = 'e' 'n'", "lang = 'e'\n'n'", "year IN ()", "year IN (1,)", "year IN 1", "ok = 1", "year = '1'", "lang = 1",
    "lang = true", "ok = 'true'", "lang IS NULL IS NULL", "ok ok", "ok,ok", "oKaNd ok", "ok aNd nOt(year=1)", "ok AND",
    "AND ok", "OR", "NOT", "()", "(ok))", "((ok)", "", " ", "\n", "\u00a0ok\u2003", "lang='en'AND ok", "year=1AND ok",
    "year IN(1)OR(ok)", "lang ıN ('en')", "lang lıKE 'e%'", "ok OR lang iſ NULL", "_rowid = 1", "_rowoffset = 1",
    "vector = 1", "vector IS NULL", "_distance < 1", "ok\u202e", "lang = 'en' \u200b", "ok\ufeff", "ok\\", "@ok",
    "NOT (ok AND NOT ok)", "ok OR NOT ok", "NOT (lang IN ('en') AND lang NOT IN ('en'))",
    "lang NOT IN ('a') OR lang NOT IN ('b')", "NOT (lang = 'x' AND lang = 'y')", "NOT (ratio > 1)",
    "NOT (ratio > 1 AND NOT ratio > 1)", "ratio <= 1 OR ratio > 1", "NOT (lang LIKE '%' AND lang NOT LIKE '%')",
    "NOT (year < 0 OR year >= 0)", "NOT (lang IS NULL AND lang IS NOT NULL)",
]  # fmt: skip


class Writer:
    """Random texts of one string number."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.pick = rng, rng.choice

    def space(self) -> str:
        return self.pick([" ", " ", " ", "  ", "\n", "\t", "\u00a0"])

    def keyword(self, word: str) -> str:
        return self.pick([word, word, word.lower(), "".join(self.pick([c.lower(), c]) for c in word)])

    def name(self, name: str) -> str:
        return self.pick([*([name] * 4 if name in BARE else []), f"`{name}`", f'"{name}"'])

    def literal(self, name: str) -> str:
        kind = COLUMNS[name].kind
        if kind == "string":
            return quoted(self.pick([self.pick(TYPES[name][2]) or "", self.pick(WORDS[:-1]), self.pick(PATTERNS)]))
        if kind == "boolean":
            return self.keyword(self.pick(["TRUE", "FALSE"]))
        own = [repr(value) for value in TYPES[name][2] if value is not None and math.isfinite(value)]
        return self.pick([self.pick(NUMBERS), self.pick(own), str(self.rng.randint(-5, 300))])

    def test(self) -> str:
        name, space = self.pick(list(TYPES)), self.space()
        column, no = self.name(name), self.pick(["", self.keyword("NOT") + space])
        shape = self.pick(["op", "op", "op", "in", "null", "like" if COLUMNS[name].kind == "string" else "op", "flag"])
        if shape == "flag":
            return self.name("ok")
        if shape == "null":
            return f"{column} {self.keyword('IS')}{space}{no}{self.keyword('NULL')}"
        if shape == "like":
            return f"{column} {no}{self.keyword('LIKE')}{self.pick(['', space])}{quoted(self.pick(PATTERNS))}"
        if shape == "in":
            items = [self.literal(name) for _ in range(self.rng.randint(1, 4))]
            return f"{column} {no}{self.keyword('IN')}{self.pick(['', space])}({self.pick([',', ', ']).join(items)})"
        tight = self.pick(["", space])
        return f"{column}{tight}{self.pick(['=', '!=', '<>', '<', '<=', '>', '>='])}{tight}{self.literal(name)}"

    def condition(self, depth: int) -> str:
        """Tests repeat, so that a condition often meets its own opposite."""
        some = [self.test() for _ in range(self.rng.randint(1, 3))]

        def made(depth: int) -> str:
            shape = self.pick(["test", "not", "and", "or", "and", "or"] if depth else ["test"])
            if shape == "test":
                return self.pick(some)
            if shape == "not":
                return f"{self.keyword('NOT')}{self.pick([' ', ''])}({made(depth - 1)})"
            word = f" {self.keyword(shape.upper())} "
            parts = [self.pick(["({})", "{}"]).format(made(depth - 1)) for _ in range(self.rng.randint(2, 3))]
            return word.join(parts)

        return made(depth)

    def changed(self, text: str) -> str:
        """Tokens or characters deleted, inserted, swapped or doubled."""
        for _ in range(self.rng.randint(1, 3)):
            parts = self.pick([list, lambda text: re.findall(r"\w+|\s+|[^\w\s]", text)])(text) or [""]
            at, other = self.rng.randrange(len(parts)), self.rng.randrange(len(parts))
            deed = self.pick(["delete", "insert", "swap", "double"])
            if deed == "delete":
                parts[at] = ""
            elif deed == "insert":
                extra = [
                    *"'\"`()%_-.,;\\=<>!\x00 ’",
                    "NOT ",
                    " OR ",
                    " AND ",
                    "--",
                    "/*",
                    "IN",
                    "NULL",
                    "1",
                    "e",
                    "'x'",
                ]
                parts[at] = self.pick(extra) + parts[at]
            elif deed == "swap":
                parts[at], parts[other] = parts[other], parts[at]
            else:
                parts[at] *= 2
            text = "".join(parts)
        return text

    def text(self) -> str:
        shape = self.rng.random()
        if shape < 0.5:
            return self.condition(self.rng.randint(0, 4))
        if shape < 0.8:
            return self.changed(self.condition(self.rng.randint(0, 3)))
        attack = self.pick([text for text in CLASSIC if len(text) < 300])
        if shape < 0.9:
            return self.pick(["{1}{0}", "{0} OR {1}", "{0} AND ({1})", "{1} AND {0}", "NOT ({0})"]).format(
                attack, self.condition(1)
            )
        return f"lang {self.pick(['=', '<', 'LIKE', '!='])} " + self.pick([quoted(attack), f"'{attack}'"])


def written(seed: int, number: int) -> str:
    """String `number` of a seed: the classic ones first."""
    if number < len(CLASSIC):
        return CLASSIC[number]
    return Writer(random.Random(f"{seed}/{number}")).text()


@dataclass
class Outcome:
    """What came of the strings; `different` and `violations` hold lines to read and to replay."""

    counts: Counter = field(default_factory=Counter)
    different: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class Check:
    """One table, and its strings one by one."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed, self.outcome = seed, Outcome()
        self.rows, table = stored(seed)
        self.table = lance.write_dataset(
            table, str(folder / "t.lance"), data_storage_version="2.2", max_rows_per_file=40
        )

    def __call__(self, number: int) -> None:
        text, out = written(self.seed, number), self.outcome
        replay = f"--seed {self.seed} --only {number}: {ascii(text[:400])}"
        try:
            means = Reading(text).means
        except (Refused, RecursionError):
            means = None
        try:
            sql = rebuild(text, COLUMNS)
        except QueryError:
            out.counts["refused"] += 1
            out.counts["refused_inside_the_grammar"] += means is not None
            return
        except Exception as error:  # a defect, to be told with the others
            out.different.append(f"{replay}: {error!r}")
            return
        if means is None:
            out.violations.append(f"{replay} became {sql[:400]}")
            return
        wanted = [number for number, row in enumerate(self.rows) if means(row) is True]
        try:
            found = self.found(sql, nearest=number % 7 == 0)
        except Exception as error:  # Lance refuses what was let through
            out.different.append(f"{replay} became {ascii(sql[:400])}: {str(error)[:200]}")
            return
        if any(rows != wanted for rows in found):
            odd = [self.rows[row] for row in sorted(set(wanted) ^ set(min(found, key=lambda rows: rows == wanted)))][:2]
            out.different.append(f"{replay} became {ascii(sql[:400])}: rows {odd}")
        else:
            out.counts["equal"] += 1
            out.counts["equal_and_neither_none_nor_all"] += 0 < len(wanted) < len(self.rows)

    def found(self, sql: str, nearest: bool) -> list[list[int]]:
        """Rows of a scan, and for some strings of a nearest scan that filters first."""
        scans = [self.table.scanner(columns=["_rowoffset"], filter=sql)]
        if nearest:
            target = {"column": "vector", "q": np.ones(2, np.float32), "k": len(self.rows)}
            columns = ["_rowoffset", "_distance"]
            scans.append(self.table.scanner(columns=columns, nearest=target, filter=sql, prefilter=True))
        return [sorted(scan.to_table()["_rowoffset"].to_pylist()) for scan in scans]


def check(seed: int, numbers: Sequence[int]) -> dict:
    """The result of these strings of a seed."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Check(seed, Path(folder))
        for number in numbers:
            run(number)
    out = run.outcome
    return {
        "count": len(numbers), **dict(sorted(out.counts.items())), "different": len(out.different),
        "violations": len(out.violations), "seconds": round(time.perf_counter() - start, 1), "seed": seed,
        "lines": out.different + out.violations,
    }  # fmt: skip


def main() -> int:
    """Print every difference and the result; 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--only", type=int, help="replay one string")
    asked = parser.parse_args()
    result = check(asked.seed, range(asked.count) if asked.only is None else range(asked.only, asked.only + 1))
    for line in result.pop("lines"):
        print(line)
    print(json.dumps(result))
    return int(bool(result["different"] or result["violations"]))


if __name__ == "__main__":
    sys.exit(main())
