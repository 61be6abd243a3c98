"""fuse(model): swap the forwards of a model's blocks in place, say what was done, and undo it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from fusedres import eligibility, families, gates, swap
from fusedres.blocks.block import Block
from fusedres.epilogue import IDENTITY, Activation, of_module
from fusedres.modules import is_batch_norm, window_of
from fusedres.report import Code, Objection, Report, Row
from fusedres.residual import Residual
from fusedres.swap import Description, Fused, Runs

Pattern = str | type[nn.Module]
Patterns = Pattern | Iterable[Pattern]


def fuse(
    model: nn.Module, *, only: Patterns | None = None, skip: Patterns | None = None, strict: bool = False
) -> Report:
    """Let the blocks of a model run fused, each the same object as before.

    Only the `__class__` of a block changes, to a subclass of its class: parameters, children, hooks, optimisers and
    the state_dict are untouched. A block that isn't known, or not proven to be the formula, is left as it is and
    reported with a reason. `unfuse` takes everything back.

    Args:
        only: what to look at, with everything below it: paths such as "layer4.*" or module classes; all if None.
        skip: what to leave alone, with everything below it.
        strict: raise, and change nothing, where a block would be skipped.

    >>> import fusedres
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(fuse(model))
    block    family      status  what
    (model)  sequential  fused   1+relu
    1 fused
    """
    _check_module(model, "fuse")
    plans = list(_Walk(model, _Selection(model, "only", only), _Selection(model, "skip", skip)).plans())
    report = Report(tuple(plan.row for plan in plans))
    if strict and report.skipped:
        reasons = "\n".join(f"  {row.path or '(model)'}: {row.what}" for row in report.skipped)
        raise RuntimeError(
            f"strict=True, but {len(report.skipped)} blocks can't be fused (skip= excludes them):\n{reasons}"
        )
    fused = [(plan, plan.description) for plan in plans if plan.description is not None and plan.row.status == "fused"]
    try:
        for plan, description in fused:
            swap.swap(plan.module, description, plan.row.family)
    except BaseException:
        for plan, _ in fused:
            swap.restore(plan.module)
        raise
    return report


def unfuse(model: nn.Module) -> None:
    """Give every block that fuse changed its class back."""
    _check_module(model, "unfuse")
    for module in model.modules():
        swap.restore(module)


def _check_module(model: object, caller: str) -> None:
    if not isinstance(model, nn.Module):
        hint = "; fuse the model before exporting it" if type(model).__name__ == "ExportedProgram" else ""
        raise TypeError(f"{caller} takes an nn.Module, got {type(model).__name__}{hint}")


class _Plan(NamedTuple):
    """What is to become of one block; what is skipped has no description."""

    module: nn.Module
    row: Row
    description: Description | None = None


class _Selection:
    """Whether a module is picked by one of some patterns."""

    def __init__(self, model: nn.Module, argument: str, patterns: Patterns | None) -> None:
        self.given = patterns is not None
        if patterns is None:
            patterns = ()
        elif isinstance(patterns, str | type):
            patterns = (patterns,)
        self._patterns = tuple(patterns)
        named = list(model.named_modules(remove_duplicate=False))
        for pattern in self._patterns:
            if not isinstance(pattern, str | type):
                raise TypeError(f"{argument} takes paths and module classes, got {pattern!r}")
            if not any(_matches(pattern, path, module) for path, module in named):
                raise ValueError(f"{argument}={pattern!r} matches no module; a path looks like {named[-1][0]!r}")

    def picks(self, path: str, module: nn.Module) -> bool:
        return any(_matches(pattern, path, module) for pattern in self._patterns)


def _matches(pattern: Pattern, path: str, module: nn.Module) -> bool:
    return fnmatchcase(path, pattern) if isinstance(pattern, str) else isinstance(module, pattern)


class _Walk:
    """Looks at every selected module from the root down; not below what is fused as a whole."""

    def __init__(self, model: nn.Module, only: _Selection, skip: _Selection) -> None:
        self._model, self._only, self._skip = model, only, skip
        self._references = Counter(
            child for module in model.modules() for child in module._modules.values() if child is not None
        )
        self._seen: set[nn.Module] = set()

    def plans(self) -> Iterator[_Plan]:
        yield from self._visit("", self._model, not self._only.given)

    def _visit(self, path: str, module: nn.Module, selected: bool) -> Iterator[_Plan]:
        if module in self._seen or self._skip.picks(path, module):
            return
        self._seen.add(module)
        selected = selected or self._only.picks(path, module)
        barrier = eligibility.barrier(module)
        if barrier is not None:
            if selected:
                yield _Plan(module, _skipped(path, type(module).__name__, barrier))
            return
        plan = self._plan(path, module) if selected else None
        if plan is not None:
            yield plan
            whole = plan.row.status != "skipped" and not isinstance(plan.description, Runs)
            if whole or plan.row.code is Code.UNSUPPORTED:
                return
        for name, child in module._modules.items():
            if child is not None:
                yield from self._visit(f"{path}.{name}" if path else name, child, selected)

    def _plan(self, path: str, module: nn.Module) -> _Plan | None:
        if isinstance(module, Fused | Block):
            family = module.family if isinstance(module, Fused) else "fusedres"
            description = module.description if isinstance(module, Fused) else module.residual
            return _Plan(module, _described(path, family, "already fused", module, description), description)
        found = families.find(module)
        if found is None:
            return None
        if isinstance(found.description, Objection):
            return _Plan(module, _skipped(path, found.family, found.description))
        objection = eligibility.objection(module, found.description, self._references)
        if objection is not None:
            return _Plan(module, _skipped(path, found.family, objection))
        row = _described(path, found.family, "fused", module, found.description)
        return _Plan(module, row, found.description)


def _skipped(path: str, family: str, objection: Objection) -> Row:
    return Row(path, family, "skipped", code=objection.code, reason=objection.reason)


def _described(path: str, family: str, status: str, block: nn.Module, description: Description) -> Row:
    fused: list[str] = []
    plain: list[str] = []
    for residual in eligibility.residuals(description):
        for stage in residual.stages[: None if residual.shortcut is None else -1]:
            act = _activation_name(block, stage.act)
            before, after = _active(block, stage.before_act), _active(block, stage.after_act)
            if act and not before:
                pool = [path for path in after[:1] if window_of(block.get_submodule(path)) is not None]
                fused.append("+".join([stage.norm, act, *pool]))
                after = after[len(pool) :]
            plain += [*before, *after]
        if residual.shortcut is not None:
            whole, also_plain = _last_operation(block, residual)
            fused.append(whole)
            plain += also_plain
    return Row(path, family, status, tuple(fused), tuple(plain))


def _last_operation(block: nn.Module, residual: Residual) -> tuple[str, list[str]]:
    """The words for norm, gate, addition and activation, and the children that stay as they are."""
    terms = [residual.stages[-1].norm]
    plain = []
    for path in _active(block, residual.between):
        gate = gates.of_module(block.get_submodule(path))
        if gate is None:
            terms, plain = [], [*plain, path]
        else:
            terms = [path] if gate.reads else [*terms, path]
    terms += [] if residual.gate is None else [residual.gate]
    return "+".join([*terms, *_shortcut_norm(block, residual), "add", _activation_name(block, residual.act)]).rstrip(
        "+"
    ), plain


def _shortcut_norm(block: nn.Module, residual: Residual) -> list[str]:
    paths = residual.shortcut
    if isinstance(paths, str):
        whole = _find(block, paths)
        paths = tuple(f"{paths}.{name}" for name in whole._modules) if type(whole) is nn.Sequential else ()
    last = _find(block, paths[-1]) if paths and len(paths) > 1 else None
    return [paths[-1]] if paths and last is not None and is_batch_norm(last) else []


def _activation_name(block: nn.Module, act: str | Activation | None) -> str:
    """The catalogue's name; empty where the activation isn't in it and runs as it is."""
    if isinstance(act, str):
        child = _find(block, act)
        act = None if child is None else of_module(child)
    return "" if act is None or act is IDENTITY else act.name


def _active(block: nn.Module, paths: tuple[str, ...]) -> list[str]:
    children = {path: _find(block, path) for path in paths}
    return [path for path, child in children.items() if child is not None and not isinstance(child, nn.Identity)]


def _find(block: nn.Module, path: str) -> nn.Module | None:
    child: nn.Module | None = block
    for name in path.split("."):
        child = None if child is None else child._modules.get(name)
    return child
