"""Great Expectations over a dataset, scanning old partitions once only. The one module that imports it.

Row-local expectations (`ROW_LOCAL`: a row's verdict depends on that row alone) see a partition once in its life: what
they found is kept as a `Record` under the partition's identity, and a later run of the same suite adds the counts up.
So `mostly` is judged over the window, never over a day. Every other expectation, of a type unknown to us too, sees the
clean rows of the whole window, each time.

What is set aside. A row that fails a row-local expectation without `mostly` goes to quarantine, and the clean
partition is written without it: this depends on the row and the suite only, so a clean partition is a function of its
partition. A row that fails an expectation with `mostly` stays: the pack's author has said that a share of such rows is
to be lived with. Where that share is exceeded over the window the validation fails, and these rows are shown and kept
in the quarantine object too, although the clean partitions hold them.

A validation fails when more than `data.quarantine` of the window's rows would be set aside, when `mostly` is missed
over the window, or when an expectation over the whole window fails or cannot be evaluated.

Great Expectations' pandas engine ignores nulls in everything but `expect_column_values_to_not_be_null`, and so does
this. Frames are handed to it with pandas types: int64, or Int64 where a value is missing, so that integers stay exact;
float64, bool or object, object for text and dates, datetime64 in UTC. Some expectations cannot evaluate Int64, and sums
may overflow 64 bits: `_Batch` has other frames of the same rows for these.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evergreen.columns import named, series, stacked, unused
from evergreen.data import partitions
from evergreen.data.conditions import ALLOWED, Condition, ConditionError
from evergreen.errors import PackError, ValidationError, nearest
from evergreen.pack import Expectation, Pack, parse_instant
from evergreen.run import Manifest, PartitionFile, Ref, Validated, Value, count, period_name

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import polars as pl

    from evergreen.data.store import Store

ROW_LOCAL = frozenset(
    {
        "expect_column_pair_values_a_to_be_greater_than_b",
        "expect_column_pair_values_to_be_equal",
        "expect_column_pair_values_to_be_in_set",
        "expect_column_value_lengths_to_be_between",
        "expect_column_value_lengths_to_equal",
        "expect_column_values_to_be_between",
        "expect_column_values_to_be_dateutil_parseable",
        "expect_column_values_to_be_in_set",
        "expect_column_values_to_be_json_parseable",
        "expect_column_values_to_be_null",
        "expect_column_values_to_match_json_schema",
        "expect_column_values_to_match_regex",
        "expect_column_values_to_match_regex_list",
        "expect_column_values_to_match_strftime_format",
        "expect_column_values_to_not_be_in_set",
        "expect_column_values_to_not_be_null",
        "expect_column_values_to_not_match_regex",
        "expect_column_values_to_not_match_regex_list",
        "expect_multicolumn_sum_to_equal",
        "expect_multicolumn_values_to_be_equal",
        "expect_select_column_values_to_be_unique_within_record",
    }
)
"""The types whose verdict on a row depends on that row alone. Left out on purpose although they are map expectations:
unique, compound unique, increasing, decreasing, z-scores and outliers (they compare rows), and the two about types
(they look at the column's type, which is one for the whole window)."""

CONDITION_ARGUMENTS = ("row_condition", "condition_parser")
ABOUT_NAMED = ("expect_column_", "expect_compound_columns_", "expect_multicolumn_", "expect_select_column_")
"""Prefixes of the expectation types that look only at the columns they name."""
COLUMN_ARGUMENTS = ("column", "column_A", "column_B", "column_list", "column_set")
SUMS = frozenset({"expect_column_sum_to_be_between", "expect_multicolumn_sum_to_equal"})
"""Types that add numbers up: 64 bits may overflow."""
ABOUT_TYPES = frozenset({"expect_column_values_to_be_in_type_list", "expect_column_values_to_be_of_type"})
"""Types that look at a column's type. Packs name those that pandas gives by default."""
ABOUT_COLUMNS = frozenset({"expect_column_to_exist", "expect_table_columns_to_match_set"})
"""Types that may name a column which is not there."""
INDEX = "evergreen.index"
"""Where an expectation's `meta` keeps its place in the pack: Great Expectations answers in an order of its own."""
FAILED = "failed_expectations"
"""The last column of a quarantine file: it names the expectations a row failed, with `; ` between them. Where the data
have a column of that name, it has underscores after it."""
EXAMPLES = 5
ENGINE = 2
"""Changes when the same rows may be judged otherwise: records of an earlier engine are not reused. 2: exact integers."""


class Count(Value):
    """What a row-local expectation made of one partition's rows."""

    elements: int
    """Rows it looked at: all, or those of its `row_condition`."""
    considered: int
    """Those whose value is not missing: what `mostly` is a share of."""
    unexpected: int


class Record(Value):
    """What the row-local expectations of a suite made of one partition."""

    rows: int
    clean: PartitionFile | None
    """The partition without the rows set aside: itself when there are none, None when all of them are."""
    quarantined: int = 0
    quarantine: Ref | None = None
    """Parquet of the rows set aside, and `failed_expectations`."""
    counts: tuple[Count, ...] = ()
    """For each row-local expectation, in the order of the pack."""


def records(content: Mapping[str, Any]) -> dict[str, Record]:
    """Records by partition identity, from the JSON that `Validated.records` refers to."""
    return {identity: Record.model_validate(record) for identity, record in content.items()}


def suite_hash(expectations: Sequence[Expectation]) -> str:
    """sha256 over types and arguments, in their order, and over which are row-local: records are kept under it."""
    rules = [_Rule(index, expectation, Path()) for index, expectation in enumerate(expectations)]
    content = [ENGINE, *([rule.type, rule.arguments, rule.is_row_local] for rule in rules)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Failure:
    """An expectation that stops the run, and why."""

    rule: str
    why: str
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a validation found; `error()` says whether the run may go on."""

    validated: Validated
    failures: tuple[Failure, ...]
    rows_scanned: int
    """Rows that row-local expectations looked at this time."""
    pack: Pack

    def error(self) -> ValidationError | None:
        """None when the validation succeeded, else what to raise: each expectation with at most five rows."""
        if not self.failures:
            return None
        lines = [f"pack {self.pack.name}: {count(len(self.failures), 'expectation')} failed; the champion stays"]
        for failure in self.failures[:EXAMPLES]:
            lines += [f"  {failure.rule}: {failure.why}", *(f"    {example}" for example in failure.examples)]
        if len(self.failures) > EXAMPLES:
            lines.append(
                f"  and {len(self.failures) - EXAMPLES} more; all are in the result {self.validated.result.hash}"
            )
        if self.validated.quarantine is not None:
            lines.append(f"  the rows: object {self.validated.quarantine.hash} of the store, Parquet")
        file = self.pack.folder / "pack.yaml"
        fix = (
            f"mend the rows at their source, or change the expectation, its mostly, or data.quarantine in {file}; "
            "then clear the run, ingest included, or start a new one"
        )
        return ValidationError("\n".join(lines), fix=fix)


def check(pack: Pack, columns: Iterable[str] | None = None) -> None:
    """Raise PackError for an expectation that Great Expectations does not know or refuses, or whose column is missing."""
    rules = _rules(pack)
    if columns is not None:
        _check_columns(rules, list(columns))
    for rule in rules:
        rule.build({})


def validate(pack: Pack, manifest: Manifest, store: Store, known: Mapping[str, Record], work: Path) -> Outcome:
    """Hold the partitions of `manifest` to the pack's expectations; the objects of the outcome are pushed.

    `known` are the records of an earlier validation under the same suite hash. `work` is a folder to write in. Raises
    PackError for an expectation that cannot be, ValidationError for a row-local one that cannot be evaluated.
    """
    rules = _rules(pack)
    _check_columns(rules, list(manifest.columns))
    local = [rule for rule in rules if rule.is_row_local]
    whole = [rule for rule in rules if not rule.is_row_local]
    this = _Validation(pack, manifest, store, work)

    unseen = [part for part in manifest.partitions if local and not this.trusts(known.get(part.identity), part)]
    seen, ran = this.scan(unseen, local)
    kept = {
        part.identity: seen.get(part.identity)
        or (known[part.identity] if local else Record(rows=part.rows, clean=part))
        for part in manifest.partitions
    }
    for part in manifest.partitions:
        record = kept[part.identity]
        place = f"{pack.name} {period_name(part.period, manifest.partition)}: rows clean and in quarantine"
        partitions.require_all_rows(place, part.rows, (record.clean.rows if record.clean else 0) + record.quarantined)
    totals = {rule: _total(record.counts[n] for record in kept.values()) for n, rule in enumerate(local)}
    set_aside = sum(record.quarantined for record in kept.values())
    too_many = set_aside > pack.data.quarantine * manifest.rows
    failed = [rule for rule in local if not rule.holds(totals[rule]) and (too_many or rule.mostly < 1)]

    bad_rows = this.rows_set_aside(kept.values())
    for rule in failed:
        if rule.mostly < 1:
            n = local.index(rule)
            bad_rows.append(
                this.rows_failing(rule, [p for p in manifest.partitions if kept[p.identity].counts[n].unexpected])
            )
    clean = manifest.model_copy(update={"partitions": tuple(record.clean for record in kept.values() if record.clean)})
    ran_whole, failures = this.run_whole(whole, clean)
    failures = [this.failure(rule, totals[rule], set_aside, bad_rows) for rule in failed] + failures

    suite = suite_hash(pack.expectations)
    results = [rule.over_window(ran.get(rule), totals[rule]) for rule in local] + list(ran_whole.values())
    own = {
        "suite_hash": suite,
        "success": not failures,
        "rows": manifest.rows,
        "rows_quarantined": set_aside,
        "partitions": len(manifest.partitions),
        "partitions_scanned": len(unseen),
    }
    validated = Validated(
        manifest=store.put_json(clean.model_dump(mode="json")),
        result=store.put_json(_suite_result(pack, results, own)),
        suite_hash=suite,
        success=not failures,
        expectations=len(rules),
        rows_checked=manifest.rows,
        rows_quarantined=set_aside,
        quarantine=this.keep_quarantine(bad_rows),
        records=store.put_json({identity: record.model_dump(mode="json") for identity, record in kept.items()}),
        partitions=len(manifest.partitions),
        partitions_scanned=len(unseen),
    )
    store.push(_objects(validated, seen.values()))
    return Outcome(validated, tuple(failures), sum(part.rows for part in unseen), pack)


def docs(pack: Pack, result: Mapping[str, Any], folder: Path) -> Path:
    """Build Great Expectations' Data Docs, a static site, from a stored result into `folder`; → its index.html."""
    context = _context()
    from great_expectations.core import ExpectationSuite, ExpectationSuiteValidationResult, RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import (
        ExpectationSuiteIdentifier,
        ValidationResultIdentifier,
    )

    suite = ExpectationSuite(name=pack.name)
    for rule in _rules(pack):
        suite.add_expectation(rule.build({}))
    context.suites.add(suite)
    key = ValidationResultIdentifier(
        expectation_suite_identifier=ExpectationSuiteIdentifier(pack.name),
        run_id=RunIdentifier(run_name=pack.name),
        batch_identifier=pack.dataset,
    )
    context.validation_results_store.set(key, ExpectationSuiteValidationResult(**_with_results(result)))
    site = {
        "class_name": "SiteBuilder",
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(folder.absolute())},
    }
    context.add_data_docs_site(site_name="evergreen", site_config=site)
    context.build_data_docs(site_names=["evergreen"])
    return folder / "index.html"


# The pack's expectations.


@dataclass(frozen=True)
class _Rule:
    """An expectation and its place in the pack."""

    index: int
    expectation: Expectation
    file: Path

    def __hash__(self) -> int:
        return self.index

    @property
    def type(self) -> str:
        return self.expectation.type

    @property
    def arguments(self) -> dict[str, Any]:
        return self.expectation.arguments

    @property
    def name(self) -> str:
        columns = f" ({', '.join(self.columns)})" if self.columns else ""
        return f"expectations.{self.index} {self.type}{columns}"

    @property
    def mostly(self) -> float:
        mostly = self.arguments.get("mostly", 1)
        return float(mostly) if isinstance(mostly, int | float) else 1.0

    @property
    def is_row_local(self) -> bool:
        """Tell whether the verdict on a row depends on that row alone. A `row_condition` looks at one row, too."""
        return self.type in ROW_LOCAL

    @property
    def looks_at(self) -> tuple[str, ...] | None:
        """The columns that it looks at; None where it may look at all."""
        if not self.columns or self.type in ABOUT_COLUMNS or not self.type.startswith(ABOUT_NAMED):
            return None
        return (*self.columns, *(self.condition.columns if self.condition else ()))

    @property
    def condition_text(self) -> str:
        """The `row_condition` as the pack has it; empty without one."""
        return str(self.arguments.get("row_condition") or "")

    @cached_property
    def condition(self) -> Condition | None:
        """The parsed `row_condition`. Raises ConditionError."""
        return Condition(self.condition_text) if self.condition_text else None

    @property
    def columns(self) -> list[str]:
        """The columns it names."""
        named = (self.arguments.get(argument) for argument in COLUMN_ARGUMENTS)
        return [str(column) for value in named if value for column in ([value] if isinstance(value, str) else value)]

    @property
    def asks(self) -> str:
        """Its arguments but the columns, as the end of a sentence; empty when there are none."""
        shown = {key: value for key, value in self.arguments.items() if key not in COLUMN_ARGUMENTS}
        text = ", ".join(f"{key} {value}" for key, value in shown.items())
        return f"; asked: {text if len(text) <= 200 else text[:199] + '…'}" if text else ""

    def holds(self, total: Count) -> bool:
        """Great Expectations' own rule, over the window: the share of what was considered is at least `mostly`."""
        return not total.considered or (total.considered - total.unexpected) / total.considered >= self.mostly

    def build(self, types: Mapping[str, str]) -> Any:
        """The Great Expectations object. Raises PackError for a type it does not know or arguments it refuses."""
        _great_expectations()
        from great_expectations.exceptions import ExpectationNotFoundError
        from great_expectations.expectations.expectation_configuration import ExpectationConfiguration
        from great_expectations.expectations.registry import list_registered_expectation_implementations

        # Great Expectations would hand a condition to pandas, which evaluates it as code: `_Batch` chooses the rows itself.
        arguments = {
            key: _typed(key, value, self.arguments, types)
            for key, value in self.arguments.items()
            if key not in CONDITION_ARGUMENTS
        }
        meta = {**(arguments.pop("meta", None) or {}), INDEX: self.index}
        try:
            built = ExpectationConfiguration(type=self.type, kwargs=arguments, meta=meta).to_domain_obj()
        except ExpectationNotFoundError:
            raise PackError(
                f"{self.file}: expectations.{self.index}: {self.type!r} is not a Great Expectations type",
                fix=nearest(self.type, list_registered_expectation_implementations()),
            ) from None
        except Exception as error:
            raise PackError(
                f"{self.file}: {self.name}: {_refusal(error)}",
                fix=f"give {self.type} the arguments that Great Expectations documents",
            ) from error
        for key, value in arguments.items():
            rounded = getattr(built, key, value)
            if isinstance(value, int) and isinstance(rounded, float) and int(rounded) != value:
                raise PackError(
                    f"{self.file}: {self.name}: {key}: Great Expectations would round {value} to {int(rounded)}",
                    fix=f"give a number that float64 holds exactly, such as {int(rounded)}",
                )
        return built

    def over_window(self, ran: dict[str, Any] | None, total: Count) -> dict[str, Any]:
        """Great Expectations' result for this row-local expectation, with the counts of the whole window in it.

        `ran` is what it said of the partitions scanned this time, None when there were none.
        """
        config = {"type": self.type, "kwargs": self.arguments, "meta": {INDEX: self.index}, "severity": "critical"}
        calm = {"raised_exception": False, "exception_traceback": None, "exception_message": None}
        base = ran or {"expectation_config": config, "result": {}, "meta": {}, "exception_info": calm}
        missing = total.elements - total.considered
        counts = {
            "element_count": total.elements,
            "unexpected_count": total.unexpected,
            "unexpected_percent": _percent(total.unexpected, total.considered),
            "partial_unexpected_list": base["result"].get("partial_unexpected_list", []),
            "missing_count": missing,
            "missing_percent": _percent(missing, total.elements),
            "unexpected_percent_total": _percent(total.unexpected, total.elements),
            "unexpected_percent_nonmissing": _percent(total.unexpected, total.considered),
        }
        return {**base, "success": self.holds(total), "result": {**base["result"], **counts}}


def _rules(pack: Pack) -> list[_Rule]:
    """The pack's expectations in order. Raises PackError for an argument that would be evaluated as code."""
    file = pack.folder / "pack.yaml"
    rules = [_Rule(index, expectation, file) for index, expectation in enumerate(pack.expectations)]
    for rule in rules:
        _refuse_code(rule)
    return rules


def _refuse_code(rule: _Rule) -> None:
    """Raise PackError for a condition outside of the grammar, a parameter to be computed, and a schema to be fetched."""
    text = rule.arguments.get("row_condition")
    if text is not None and not isinstance(text, str):
        raise PackError(f"{rule.file}: {rule.name}: row_condition is no text", fix=ALLOWED)
    try:
        _ = rule.condition
    except ConditionError as error:
        raise PackError(f"{rule.file}: {rule.name}: row_condition {str(text)[:80]!r}: {error}", fix=ALLOWED) from error
    for place, key, value in _entries(rule.arguments):
        if key == "$PARAMETER":
            raise PackError(f"{rule.file}: {rule.name}: {place} is computed", fix="write the value itself")
        if key == "$ref" and not str(value).startswith("#"):
            raise PackError(
                f"{rule.file}: {rule.name}: {place} refers to {str(value)[:80]!r}, which would be fetched",
                fix="write that part of the schema into this one, and refer to it as '#/…'",
            )


def _entries(content: Any, place: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every entry of every mapping within `content`: its place, its key and its value."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        inner = f"{place}.{key}" if place else str(key)
        if isinstance(content, dict):
            yield inner, str(key), value
        yield from _entries(value, inner)


def _check_columns(rules: Sequence[_Rule], columns: Sequence[str]) -> None:
    for rule in rules:
        conditioned = rule.condition.columns if rule.condition else ()
        named = conditioned if rule.type in ABOUT_COLUMNS else (*rule.columns, *conditioned)
        for column in named:
            if column not in columns:
                raise PackError(
                    f"{rule.file}: {rule.name}: the dataset has no column {column!r}", fix=nearest(column, columns)
                )


def _typed(key: str, value: Any, arguments: Mapping[str, Any], types: Mapping[str, str]) -> Any:
    """A bound or a value set in the type of its column: YAML gives dates and times as text; naive means UTC."""
    kind = types.get(str(arguments.get("column")))
    if key not in ("min_value", "max_value", "value_set") or kind not in ("date", "datetime"):
        return value
    if isinstance(value, list):
        return [_typed(key, item, arguments, types) for item in value]
    try:
        instant = parse_instant(value) if isinstance(value, str | date) else None
    except ValueError:
        return value
    if instant is None or (kind == "date" and instant.time() != time()):
        return value
    return instant if kind == "datetime" else instant.date()


def _refusal(error: Exception) -> str:
    """The first thing that pydantic, or Great Expectations, has against the arguments."""
    mistakes = error.errors() if hasattr(error, "errors") else []
    if not mistakes:
        return " ".join(str(error).split())[:300]
    where = ".".join(str(part) for part in mistakes[0]["loc"] if part != "__root__")
    return f"{where + ': ' if where else ''}{mistakes[0]['msg']}"


# Running Great Expectations.


class _View:
    """The rows that expectations with one `row_condition` look at, under Great Expectations."""

    def __init__(self, rows: pl.DataFrame, types: Mapping[str, str], positions: np.ndarray[Any, Any]) -> None:
        self.positions = positions
        """(n,) the position of each of these rows within the batch."""
        self.types = types
        self.rows = _to_pandas(rows, types)
        self._batches: dict[str, Any] = {}

    def run(self, rules: Sequence[_Rule], result_format: str) -> dict[_Rule, dict[str, Any]]:
        """Each expectation's own result, as JSON."""
        of_types = [rule for rule in rules if rule.type in ABOUT_TYPES]
        exact = [rule for rule in rules if rule.type not in ABOUT_TYPES | SUMS]
        results = self._validate("types", of_types, result_format) | self._validate("rows", exact, result_format)
        # Great Expectations cannot compare two columns, or compute some figures, where Int64 has a missing value.
        rest = [rule for rule in rules if rule not in results or _exception(results[rule]) is not None]
        return results | self._validate("numbers", rest, result_format)

    def _validate(self, name: str, rules: Sequence[_Rule], result_format: str) -> dict[_Rule, dict[str, Any]]:
        if not rules:
            return {}
        _great_expectations()
        from great_expectations import ExpectationSuite

        if name not in self._batches:
            asset = _context().data_sources.add_pandas("evergreen").add_dataframe_asset(name)
            frame = {"dataframe": self._frame(name)}
            self._batches[name] = asset.add_batch_definition_whole_dataframe("all").get_batch(frame)
        by_index = {rule.index: rule for rule in rules}
        # The constructor keeps expectations that differ in their place only; `add_expectation` would drop one.
        suite = ExpectationSuite(name="rows", expectations=[rule.build(self.types) for rule in rules])
        found = self._batches[name].validate(suite, result_format=result_format)
        results = [result.to_json_dict() for result in found.results]
        return {by_index[result["expectation_config"]["meta"][INDEX]]: result for result in results}

    def _frame(self, name: str) -> pd.DataFrame:
        """The `rows`; or without Int64, `numbers` with the same values, `types` with those that pandas would have."""
        if name == "rows":
            return self.rows
        integers = [column for column, kind in self.types.items() if kind == "int" and column in self.rows]
        if name == "types":
            return self.rows.astype({column: "float64" for column in integers if self.rows[column].hasnans})
        frame = self.rows.copy(deep=False)  # not assign(), whose keywords are no place for names of columns
        for column, values in _without_int64(self.rows[integers]).items():
            frame[column] = values
        return frame


class _Batch:
    """Rows under Great Expectations."""

    def __init__(self, rows: pl.DataFrame, types: Mapping[str, str]) -> None:
        self.types = types
        self._rows = rows
        self._views: dict[str, _View] = {}

    def run(self, rules: Sequence[_Rule], result_format: str) -> dict[_Rule, dict[str, Any]]:
        """Each expectation's own result, as JSON; positions within are those of its view. Raises ValidationError."""
        results: dict[_Rule, dict[str, Any]] = {}
        groups: dict[str, list[_Rule]] = {}
        for rule in rules:
            groups.setdefault(rule.condition_text, []).append(rule)
        for group in groups.values():
            results |= self._view(group[0]).run(group, result_format)
        for rule, content in results.items():
            stated = {key: rule.arguments[key] for key in CONDITION_ARGUMENTS if key in rule.arguments}
            content["expectation_config"]["kwargs"] |= stated
        return {rule: results[rule] for rule in rules}

    def _view(self, rule: _Rule) -> _View:
        """The rows that the expectation's condition chooses: all without one. Raises ValidationError."""
        import numpy as np

        if rule.condition_text not in self._views:
            rows, positions = self._rows, np.arange(self._rows.height)
            if rule.condition is not None:
                try:
                    mask = rule.condition.mask(rows)
                except ConditionError as error:
                    raise ValidationError(
                        f"{rule.file}: {rule.name}: row_condition {rule.condition_text[:80]!r}: {error}",
                        fix="compare each column with values of its type",
                    ) from error
                rows, positions = rows.filter(mask), np.flatnonzero(mask.to_numpy())
            self._views[rule.condition_text] = _View(rows, self.types, positions)
        return self._views[rule.condition_text]

    def failing(self, rules: Sequence[_Rule]) -> dict[_Rule, np.ndarray[Any, Any]]:
        """The positions of the rows that fail each of `rules`."""
        import numpy as np

        results = self.run(rules, "COMPLETE")
        return {
            rule: self._view(rule).positions[np.array(result["result"].get("unexpected_index_list") or [], dtype=int)]
            for rule, result in results.items()
        }

    def looked_at(self, rule: _Rule, result: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The positions of the rows that a row-local expectation looked at, and of those it counted as not missing.

        Great Expectations says how many there were, not which; its own engine says which.
        """
        from great_expectations.execution_engine import PandasExecutionEngine

        built = rule.build(self.types)
        domain = built.configuration.get_domain_kwargs()
        view = self._view(rule)
        if "missing_count" not in result["result"]:
            considered = view.rows
        elif "column" in domain:
            considered = view.rows[view.rows[domain["column"]].notna()]
        else:
            engine = PandasExecutionEngine(batch_data_dict={"rows": view.rows})
            sides = {key: getattr(built, key) for key in ("column_A", "column_B", "column_list") if hasattr(built, key)}
            considered = engine.get_domain_records({**sides, "ignore_row_if": built.ignore_row_if})
        counted = result["result"]["element_count"] - result["result"].get("missing_count", 0)
        assert len(considered) == counted, f"{rule.name}: {len(considered)} rows, Great Expectations {counted}"
        return view.positions, view.positions[considered.index]


@dataclass(frozen=True)
class _Validation:
    """What is validated, with what, and where there is room to write."""

    pack: Pack
    manifest: Manifest
    store: Store
    work: Path

    def trusts(self, record: Record | None, part: PartitionFile) -> bool:
        """Whether an earlier record may stand for a scan: what it wrote beside the partition itself must be intact."""
        if record is None:
            return False
        wrote = [record.quarantine, record.clean.object if record.clean and record.clean != part else None]
        return all(self.store.verify(ref) for ref in wrote if ref is not None)

    def scan(
        self, parts: Sequence[PartitionFile], rules: Sequence[_Rule]
    ) -> tuple[dict[str, Record], dict[_Rule, dict[str, Any]]]:
        """Hold partitions to the row-local expectations, all in one frame; → records by identity, results."""
        import numpy as np

        if not parts:
            return {}, {}
        batch = _Batch(self._load(parts, rules), self.manifest.columns)
        ran = batch.run(rules, "SUMMARY")
        for rule, result in ran.items():
            if (problem := _exception(result)) is not None:
                raise ValidationError(
                    f"pack {self.pack.name}: {rule.name} cannot be evaluated: {problem}{rule.asks}",
                    fix=f"see whether its arguments suit the type of the column, in {rule.file}",
                )
        failing = batch.failing([rule for rule in rules if ran[rule]["result"].get("unexpected_count")])
        ends = np.cumsum([part.rows for part in parts])
        owner = np.repeat(np.arange(len(parts)), [part.rows for part in parts])

        def by_part(positions: Any) -> list[int]:
            return [int(n) for n in np.bincount(owner[positions], minlength=len(parts))]

        counts = []
        for rule in rules:
            looked, considered = batch.looked_at(rule, ran[rule])
            counts.append((by_part(looked), by_part(considered), by_part(failing.get(rule, []))))
        found = {}
        for n, part in enumerate(parts):
            names: dict[int, list[str]] = {}
            for rule, positions in failing.items():
                for position in positions[owner[positions] == n] if rule.mostly == 1 else ():
                    names.setdefault(int(position - ends[n] + part.rows), []).append(rule.name)
            record = self._set_aside(part, names)
            of_part = tuple(Count(elements=e[n], considered=c[n], unexpected=u[n]) for e, c, u in counts)
            found[part.identity] = record.model_copy(update={"counts": of_part})
        return found, ran

    def _set_aside(self, part: PartitionFile, names: Mapping[int, list[str]]) -> Record:
        """The partition as a clean one and a quarantine of the rows at `names`; itself when there is none."""
        import polars as pl

        if not names:
            return Record(rows=part.rows, clean=part)
        rows = pl.read_parquet(self.store.path(part.object), glob=False)
        bad = pl.Series([position in names for position in range(rows.height)])
        name = period_name(part.period, self.manifest.partition)
        aside = self.work / f"{name}.quarantine.parquet"
        why = pl.Series(unused(FAILED, rows.columns), ["; ".join(names[position]) for position in sorted(names)])
        rows.filter(bad).with_columns(why).write_parquet(aside, compression="zstd")
        clean = None
        if len(names) < rows.height:
            file = partitions.write_one(
                rows.filter(~bad),
                period=part.period,
                event_time=self.pack.data.event_time,
                path=self.work / f"{name}.parquet",
            )
            ref = self.store.put(file.path)
            clean = PartitionFile(period=part.period, rows=file.rows, identity=file.identity, object=ref)
        return Record(rows=part.rows, clean=clean, quarantined=len(names), quarantine=self.store.put(aside))

    def rows_set_aside(self, kept: Iterable[Record]) -> list[pl.DataFrame]:
        """The rows in quarantine, a frame per partition that has some."""
        import polars as pl

        return [pl.read_parquet(self.store.path(record.quarantine), glob=False) for record in kept if record.quarantine]

    def rows_failing(self, rule: _Rule, parts: Sequence[PartitionFile]) -> pl.DataFrame:
        """The rows of `parts` that fail one expectation, with its name, as quarantine has them."""
        import numpy as np
        import polars as pl

        positions = _Batch(self._load(parts, [rule]), self.manifest.columns).failing([rule])[rule]
        starts = np.cumsum([0, *(part.rows for part in parts)])
        chosen = [
            pl.read_parquet(self.store.path(part.object), glob=False)[
                positions[(positions >= start) & (positions < end)] - start
            ]
            for part, (start, end) in zip(parts, pairwise(starts.tolist()), strict=True)
        ]
        rows: pl.DataFrame = stacked(chosen)
        return rows.with_columns(pl.lit(rule.name).alias(unused(FAILED, rows.columns)))

    def keep_quarantine(self, frames: Sequence[pl.DataFrame]) -> Ref | None:
        """One Parquet object of all these rows; None when there are none."""
        if not frames:
            return None
        path = self.work / "quarantine.parquet"
        stacked(frames).write_parquet(path, compression="zstd")
        return self.store.put(path)

    def run_whole(self, rules: Sequence[_Rule], clean: Manifest) -> tuple[dict[_Rule, dict[str, Any]], list[Failure]]:
        """Hold the clean rows of the window to the other expectations; → results, failures."""
        if not rules:
            return {}, []
        rows = self._load(clean.partitions, rules)
        batch = _Batch(rows, clean.columns)
        ran = batch.run(rules, "SUMMARY")
        failed = [rule for rule in rules if not ran[rule]["success"]]
        by_row = batch.failing([rule for rule in failed if ran[rule]["result"].get("unexpected_count")])
        failures = []
        for rule in failed:
            result = ran[rule]["result"]
            positions = [int(n) for n in by_row.get(rule, ())[:EXAMPLES]]
            if (problem := _exception(ran[rule])) is not None:
                why = f"cannot be evaluated: {problem}"
            elif positions:
                why = f"{count(result['unexpected_count'], 'row')} of {result['element_count']} fail"
            else:
                why = f"observed {_short(result.get('observed_value'))}"
            failures.append(Failure(rule.name, why + rule.asks, self._show(rule, rows[positions])))
        return ran, failures

    def failure(self, rule: _Rule, total: Count, set_aside: int, bad_rows: Iterable[pl.DataFrame]) -> Failure:
        """Why a row-local expectation stops the run: `mostly` is missed, or too many rows would be set aside."""
        if rule.mostly < 1:
            share = _percent(total.considered - total.unexpected, total.considered)
            why = f"holds for {share:.4g} % of {count(total.considered, 'row')} in the window{rule.asks}"
        else:
            share = _percent(set_aside, self.manifest.rows)
            allowed = 100 * self.pack.data.quarantine
            why = (
                f"{count(total.unexpected, 'row')} of {total.considered} fail{rule.asks}; in all "
                f"{count(set_aside, 'row')}, {share:.3g} % of the window, would be set aside, and data.quarantine "
                f"allows {allowed:.3g} %"
            )
        examples: tuple[str, ...] = ()
        for rows in bad_rows:
            reasons = "; " + rows[rows.columns[-1]] + "; "
            failed = rows.filter(reasons.str.contains(f"; {rule.name}; ", literal=True))
            examples += self._show(rule, failed.head(EXAMPLES - len(examples)))
        return Failure(rule.name, why, examples)

    def _show(self, rule: _Rule, rows: pl.DataFrame) -> tuple[str, ...]:
        """Rows as `event time, column = value`, a line each."""
        event_time = self.pack.data.event_time
        columns = [name for name in dict.fromkeys(rule.columns) if name in rows.columns and name != event_time]
        return tuple(
            ", ".join(
                [f"{event_time} {row[event_time]:%Y-%m-%d %H:%M:%S}"]
                + [f"{name} = {_short(row[name])}" for name in columns]
            )
            for row in rows[[event_time, *columns]].iter_rows(named=True)
        )

    def _load(self, parts: Iterable[PartitionFile], rules: Sequence[_Rule]) -> pl.DataFrame:
        """The rows of partitions, with the columns that `rules` look at: of a wide table, the rest would not fit."""
        looked_at = [rule.looks_at for rule in rules]
        names = None
        if None not in looked_at:
            wanted = (self.pack.data.event_time, *(name for each in looked_at for name in each or ()))
            names = [name for name in dict.fromkeys(wanted) if name in self.manifest.columns]
        return partitions.load((self.store.path(part.object) for part in parts), names)


# What it comes to.


def _total(counts: Iterable[Count]) -> Count:
    found = list(counts)
    return Count(
        elements=sum(each.elements for each in found),
        considered=sum(each.considered for each in found),
        unexpected=sum(each.unexpected for each in found),
    )


def _suite_result(pack: Pack, results: Iterable[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """Great Expectations' result of the suite, in the order of the pack; our own words are under `meta.evergreen`."""
    ordered = sorted(results, key=lambda result: int(result["expectation_config"]["meta"][INDEX]))
    good = sum(result["success"] for result in ordered)
    content = {
        "success": good == len(ordered),
        "suite_name": pack.name,
        "results": ordered,
        "suite_parameters": {},
        "statistics": {
            "evaluated_expectations": len(ordered),
            "successful_expectations": good,
            "unsuccessful_expectations": len(ordered) - good,
            "success_percent": _percent(good, len(ordered)),
        },
        "meta": {
            "great_expectations_version": importlib.metadata.version("great_expectations"),
            "evergreen": own,
        },
        "id": None,
    }
    # Numbers of numpy as JSON's, NaN and infinities as null.
    plain = json.dumps(content, default=lambda value: value.item() if hasattr(value, "item") else str(value))
    found: dict[str, Any] = json.loads(plain, parse_constant=lambda _: None)
    return found


def _with_results(content: Mapping[str, Any]) -> dict[str, Any]:
    """A stored result as arguments of Great Expectations' own class."""
    from great_expectations.core import ExpectationValidationResult
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    results = [
        ExpectationValidationResult(
            **{**result, "expectation_config": ExpectationConfiguration(**result["expectation_config"])}
        )
        for result in content["results"]
    ]
    return {**content, "results": results}


def _objects(validated: Validated, seen: Iterable[Record]) -> list[Ref]:
    """What the validation wrote."""
    refs = [validated.manifest, validated.result, validated.records, validated.quarantine]
    for record in seen:
        refs += [record.quarantine, record.clean.object if record.clean else None]
    return [ref for ref in refs if ref is not None]


def _exception(result: Mapping[str, Any]) -> str | None:
    """What was raised while an expectation was evaluated, on one line; None when nothing was."""
    info = result["exception_info"] or {}
    raised = [info] if "raised_exception" in info else list(info.values())
    for each in raised:
        if each.get("raised_exception"):
            return " ".join(str(each.get("exception_message")).split())[:300]
    return None


def _percent(part: float, of: float) -> float:
    return 100 * part / of if of else 0.0


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def import_ahead() -> None:
    """Import Great Expectations, which takes seconds, before it is needed: beside a job that is waited for, say."""
    _great_expectations()


def _great_expectations() -> Any:
    """The library, imported quietly: under a chatty root logger it would print hundreds of lines, and it phones home."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations

    return great_expectations


def _context() -> Any:
    """A Great Expectations context in memory: no progress bars, and no folder for pages that nobody asked for."""
    gx = _great_expectations()
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    config = DataContextConfig(
        store_backend_defaults=InMemoryStoreBackendDefaults(init_temp_docs_sites=False),
        progress_bars=ProgressBarsConfig(globally=False),
        analytics_enabled=False,
    )
    return gx.get_context(mode="ephemeral", project_config=config)


def _to_pandas(rows: pl.DataFrame, types: Mapping[str, str]) -> pd.DataFrame:
    """Rows as Great Expectations handles them right, each column of the type it has over the window."""
    import pandas as pd
    import polars as pl

    kinds: dict[str, Any] = {"bool": pl.Boolean, "int": pl.Int64, "float": pl.Float64, "string": pl.String}
    kinds |= {"date": pl.Date, "datetime": pl.Datetime("us", "UTC")}
    typed = rows.with_columns(
        named(name).cast(kinds[kind]) for name, kind in types.items() if kind in kinds and name in rows.columns
    )
    frame = typed.to_pandas()
    for name, kind in typed.schema.items():
        if kind == pl.Int64 and typed[name].null_count():  # pandas has made it float64, which is exact up to 2**53
            missing = series(typed, name).is_null().to_numpy()
            frame[name] = pd.arrays.IntegerArray(
                series(typed, name).fill_null(0).to_numpy(allow_copy=True), missing.copy()
            )
        if kind == pl.Date:  # as datetime64, pandas would not compare it with a date
            frame[name] = typed[name].to_numpy(allow_copy=True).astype("datetime64[D]").astype(object)
    return frame


def _without_int64(integers: pd.DataFrame) -> dict[str, pd.Series[Any]]:
    """Columns as int64, or as float64 with NaN for a missing value.

    All hold Python's integers where float64 would round one of them or 64 bits not hold a sum.
    """
    import numpy as np

    sizes = [np.abs(column.dropna().to_numpy(dtype=np.float64)) for _, column in integers.items()]
    if all(each.max(initial=0.0) <= 2**53 and each.sum() < 2**62 for each in sizes):
        return {str(name): column.astype(np.float64) for name, column in integers.items() if column.hasnans}
    return {str(name): column.astype(object).where(column.notna(), np.nan) for name, column in integers.items()}
