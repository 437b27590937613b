"""Plans and rewrites."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from . import _native
from ._errors import UsageError, translated

PathLike = Union[str, "os.PathLike[str]"]
# A TOML file, the JSON of a plan, a rewritten model, a built-in recipe's name; or the recipe itself.
Recipe = Union[PathLike, Mapping[str, Any]]


@dataclass(frozen=True)
class Site:
    """A layer and what it becomes."""

    node: str
    op: str
    module_path: str | None
    role: str | None
    n: int
    """Output features."""
    k: int
    """Input features, the axis that blocks run along."""
    weight_format: str
    activation_format: str
    """`none` = weight-only."""
    bytes_before: int
    bytes_after: int
    """Codes and scales."""
    expected_sqnr_db: float | None
    """Signal to quantisation noise of the weight in decibels, when it was measured."""
    raw: dict[str, Any] = field(repr=False, hash=False)
    """The entry of `mxrewrite --plan --json`, which has all of it."""


@dataclass(frozen=True)
class Skipped:
    """A candidate that is left alone."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a rewrite does to a model."""

    sites: list[Site]
    """Layers to replace, in node order."""
    skipped: list[Skipped]
    """Every candidate that is left alone, with the reason."""
    recipe: dict[str, Any]
    """The rules that decided; goes back into `recipe=`."""
    raw: dict[str, Any] = field(repr=False)
    """The text of `mxrewrite --plan --json`."""

    @property
    def bytes_before(self) -> int:
        """Bytes of the sites' weights as they are stored now."""
        return sum(site.bytes_before for site in self.sites)

    @property
    def bytes_after(self) -> int:
        """Bytes of their codes and scales."""
        return sum(site.bytes_after for site in self.sites)


@dataclass(frozen=True)
class Report:
    """What a rewrite did."""

    input: Path
    output: Path
    data: Path | None
    """The first data file, when weights are external."""
    lowering: str
    sites: int
    """Layers replaced."""
    products: int
    """Products of two activations replaced."""
    skipped: int
    """Candidates left alone."""
    weight_bytes_before: int
    weight_bytes_after: int
    bytes: int
    """Of the whole output, data files included."""
    notes: list[str]
    plan: Plan = field(repr=False)


def plan(
    model: PathLike,
    *,
    tier: str | None = None,
    format: str | None = None,
    activation_format: str | None = None,
    recipe: Recipe | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lower: str | None = None,
    block_size: int | None = None,
    rounding: str | None = None,
    scale_rule: str | None = None,
    base_dtype: str | None = None,
    checkpoint: PathLike | None = None,
    attention: bool = False,
    allow_empty: bool = False,
    sqnr: bool = False,
    threads: int | None = None,
) -> Plan:
    """Decides a rewrite and writes nothing.

    Arguments are the options of `mxrewrite`, of the same names and meanings.

    Args:
        model: the .onnx file, with its external data beside it.
        tier: `a` (MLP), `b` = `full` (MLP and attention; the default), `c`, `d`, `all-linears` or `mlp-only`.
        format: element format of weights, one of `FORMATS` (default `fp8_e4m3`).
        activation_format: that of activations (default: the weights'); `none` = weight-only.
        recipe: rules in place of tier and formats: a TOML file, the JSON of a plan, a rewritten model, a built-in
            recipe's name, or a recipe as a dict (`Plan.recipe`).
        include, exclude: regular expressions that add layers to the tier and take them away.
        lower: `mx` (default), `qdq`, `int8`, `bf16`, `fp16`, `bfp16`, `nvfp8-emu-e4m3`, `nvfp8-emu-e5m2`, `nvfp8`.
        block_size: elements that share a scale: 16, 32 (default), 64, 128, 256.
        rounding: `even` (default), `nearest`, `floor`.
        scale_rule: `floor` (default), `ceil`, `even`, `rceil`.
        base_dtype: float type of everything else: `fp32`, `bf16`, `fp16` (default: the model's own).
        checkpoint: folder or file of safetensors in which weights are looked up.
        attention: attention's products of two activations too.
        allow_empty: finding no layer is no error.
        sqnr: read every weight once and measure what it loses.
        threads: threads to measure with (default: all).

    Raises:
        UsageError: arguments that are unknown or contradict each other.
        NothingToReplaceError: no layer is taken.
        ModelError: a file that cannot be read.
    """
    options = _options(
        tier=tier,
        format=format,
        activation_format=activation_format,
        recipe=recipe,
        include=include,
        exclude=exclude,
        lower=lower,
        block_size=block_size,
        rounding=rounding,
        scale_rule=scale_rule,
        base_dtype=base_dtype,
        checkpoint=checkpoint,
        attention=attention,
        allow_empty=allow_empty,
        threads=threads,
    )
    with translated():
        return _plan(json.loads(_native.plan(os.fspath(model), options, sqnr)))


def rewrite(
    model: PathLike,
    out: PathLike | None = None,
    *,
    tier: str | None = None,
    format: str | None = None,
    activation_format: str | None = None,
    recipe: Recipe | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lower: str | None = None,
    block_size: int | None = None,
    rounding: str | None = None,
    scale_rule: str | None = None,
    base_dtype: str | None = None,
    checkpoint: PathLike | None = None,
    attention: bool = False,
    allow_empty: bool = False,
    overwrite: bool = False,
    shard_size: int | None = None,
    resume: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Rewrites a model. The input is never touched; the output is written under a temporary name and renamed.

    Args:
        model: the .onnx file, with its external data beside it.
        out: the output (default: beside the model, `<stem>.<tier>-<format>.onnx`). Large weights go to `<out>.data`.
        overwrite: an existing output may be replaced.
        shard_size: bytes of an external data file at most; the default is one file.
        resume: go on with what a killed process has left of the same rewrite.
        threads: threads to quantise with (default: all).
        progress: called with the bytes written and those of the whole output, after every tensor, in the calling
            thread's process but maybe in another thread. What it raises ends the rewrite and is raised here.

    The other arguments are those of `plan`. The GIL is released while weights are quantised; Ctrl-C ends the rewrite
    with KeyboardInterrupt and leaves no output.

    Raises:
        UsageError, NothingToReplaceError, ModelError: as `plan`; ModelError also when `out` exists or cannot be
            written.
    """
    options = _options(
        tier=tier,
        format=format,
        activation_format=activation_format,
        recipe=recipe,
        include=include,
        exclude=exclude,
        lower=lower,
        block_size=block_size,
        rounding=rounding,
        scale_rule=scale_rule,
        base_dtype=base_dtype,
        checkpoint=checkpoint,
        attention=attention,
        allow_empty=allow_empty,
        overwrite=overwrite,
        shard_size=shard_size,
        resume=resume,
        threads=threads,
    )
    output = None if out is None else os.fspath(out)
    with translated():
        raw = json.loads(_native.rewrite(os.fspath(model), output, options, progress))
    return Report(
        input=Path(raw["input"]),
        output=Path(raw["output"]),
        data=Path(raw["data"]) if raw["data"] else None,
        lowering=raw["lowering"],
        sites=raw["sites"],
        products=raw["products"],
        skipped=raw["skipped"],
        weight_bytes_before=raw["weight_bytes_before"],
        weight_bytes_after=raw["weight_bytes_after"],
        bytes=raw["bytes"],
        notes=raw["notes"],
        plan=_plan(raw["plan"]),
    )


def _options(
    *,
    recipe: Recipe | None,
    include: Sequence[str],
    exclude: Sequence[str],
    checkpoint: PathLike | None,
    **others: Any,
) -> dict[str, Any]:
    """Every key that the extension module reads."""
    for name, value in (("include", include), ("exclude", exclude)):
        if isinstance(value, str):
            raise UsageError(f"{name}: a list of regular expressions, not one string: [{value!r}]")
    if others.get("shard_size") == 0:
        raise UsageError("shard_size: 0, but a file has at least one byte")
    inline = isinstance(recipe, Mapping)
    return {
        "overwrite": False,
        "shard_size": None,
        "resume": False,
        **others,
        "recipe": os.fspath(recipe) if recipe is not None and not inline else None,  # type: ignore[arg-type]
        "recipe_json": json.dumps(recipe) if inline else None,
        "include": list(include),
        "exclude": list(exclude),
        "checkpoint": None if checkpoint is None else os.fspath(checkpoint),
    }


def _plan(raw: dict[str, Any]) -> Plan:
    sites = [
        Site(
            node=site["node"],
            op=site["op"],
            module_path=site.get("module_path"),
            role=site.get("role"),
            n=site["n"],
            k=site["k"],
            weight_format=site["weight_format"],
            activation_format=site["activation_format"],
            bytes_before=site["bytes_before"],
            bytes_after=site["bytes_after"],
            expected_sqnr_db=site.get("expected_sqnr_db"),
            raw=site,
        )
        for site in raw["sites"]
    ]
    skipped = [Skipped(entry["node"], entry["op"], entry["reason"]) for entry in raw["skipped"]]
    return Plan(sites, skipped, raw["recipe"], raw)
