"""Which parameters are biases, and which of them the user's patterns choose. Names only; nothing is changed here."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ._validate import ConversionError
from .report import NOT_A_BIAS

TABLE = "attention/relative-position table, not a bias"
LOGIT = "logit scalar, not a bias"
ROUTER = "router correction that no gradient trains, not a bias"
OMITTED = "not matched by biases"
EXCLUDED = "excluded by biases"

CLASS = "class:"  # in front of a pattern of train_modules that is one of class names
ALTERNATIVE = "|"

_BIAS = re.compile(r"bias|.*_bias|bias_.*")
# Added to attention logits or indexed by position, hence no bias of features (Swin, LeViT, XLNet, Transformer-XL, ...).
_TABLE = re.compile(
    r".*bias_table|attention_biases|attn(?:ention)?_bias|relative_.*bias.*|rel_.*bias.*|(?:pos|position)_bias.*|r_[a-z]_bias"
)
_ROUTER = re.compile(r"e_score_correction_bias|expert_bias")


def what_is(owners: Sequence[tuple[nn.Module, str]]) -> str | None:
    """None for a bias, else why the parameter is none. A tied parameter is a bias if one of its owners says so."""
    verdicts = [_own_name(module, own) for module, own in owners]
    return None if None in verdicts else verdicts[0]


def _own_name(module: nn.Module, own: str) -> str | None:
    if _TABLE.fullmatch(own):
        return TABLE
    if own in ("bias_u", "bias_v") and {"bias_u", "bias_v"} <= module._parameters.keys():
        return TABLE  # content and position bias of a Conformer; bias_v alone with bias_k belongs to MultiheadAttention
    if own == "logit_bias":
        return LOGIT
    if _ROUTER.fullmatch(own):
        return ROUTER
    return None if _BIAS.fullmatch(own) else NOT_A_BIAS


@dataclasses.dataclass(frozen=True)
class BiasRule:
    """The `biases` argument: patterns that select and patterns that exclude."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    everything: bool  # every true bias that is not excluded
    informative: bool = False  # but for those that provably get no gradient

    def reason(self, names: Sequence[str], not_bias: str | None) -> str | None:
        """Why a parameter of these names is frozen; None if it is selected. `not_bias`: as `what_is` says."""
        if _any_match(self.exclude, names):
            return not_bias or EXCLUDED
        if not_bias is not None:
            named = any(_spells_out(pattern, name) for pattern in self.include for name in names)
            return None if named else not_bias
        return None if self.everything or _any_match(self.include, names) else OMITTED

    def check(self, names: Sequence[str], biases: Sequence[str]) -> None:
        """Refuse a pattern that does nothing, with the names that come near it."""
        for pattern in self.exclude:
            if not _any_match([pattern], names):
                raise ConversionError(f"biases: {'!' + pattern!r} matches no parameter{_near(pattern, names)}")
        for pattern in self.include:
            matched = fnmatch_all(pattern, names)
            if not matched:
                raise ConversionError(f"biases: {pattern!r} matches no parameter{_near(pattern, biases or names)}")
            if not set(matched) & set(biases) and not any(_spells_out(pattern, name) for name in matched):
                raise ConversionError(
                    f"biases: {pattern!r} matches {len(matched)} parameters, none of them a bias, such as "
                    f"{matched[0]!r}; end the pattern in the parameter's own name to train one all the same"
                )

    def widened(self, names: Sequence[str], modules: Sequence[str]) -> BiasRule:
        """The same rule, with patterns that match modules but no parameter standing for the biases of these modules."""

        def of(patterns: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(
                f"{pattern}.bias" if not _any_match([pattern], names) and _any_match([pattern], modules) else pattern
                for pattern in patterns
            )

        return BiasRule(of(self.include), of(self.exclude), self.everything, self.informative)

    def spelled(self) -> str:
        """The argument as a user would write it inside a tuple, without the brackets."""
        patterns = (["*"] if self.everything else list(self.include)) + [f"!{pattern}" for pattern in self.exclude]
        return ", ".join(f'"{pattern}"' for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class ModuleRule:
    """The `train_modules` argument: patterns that select and patterns that exclude, with all that lies below."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def covered(self, classes: Mapping[str, type[nn.Module]]) -> set[str]:
        """Names of the modules that are trained whole; ``classes``: of all modules, those around a module first."""
        covered: set[str] = set()
        left: set[str] = set()
        for name, cls in classes.items():
            around = name.rpartition(".")[0] if name else None
            if around in left or any(_selects(pattern, name, cls) for pattern in self.exclude):
                left.add(name)
            elif around in covered or any(_selects(pattern, name, cls) for pattern in self.include):
                covered.add(name)
        return covered

    def check(self, classes: Mapping[str, type[nn.Module]]) -> None:
        """Refuse a pattern that does nothing, with the names that come near it."""
        for pattern in (*self.include, *self.exclude):
            if not any(_selects(pattern, name, cls) for name, cls in classes.items()):
                near = list(classes)
                if pattern.startswith(CLASS):
                    near = sorted({name for cls in classes.values() for name in _class_names(cls)})
                spelled = pattern if pattern in self.include else f"!{pattern}"
                what = pattern.removeprefix(CLASS)
                raise ConversionError(f"train_modules: {spelled!r} matches no module{_near(what, near)}")


def bias_rule(biases: str | Sequence[str]) -> BiasRule:
    if biases in ("informative", ["informative"], ("informative",)):
        return BiasRule((), (), everything=True, informative=True)
    if biases in ("all", ["all"], ("all",)):
        return BiasRule((), (), everything=True)
    patterns = _patterns("biases", biases)
    include = tuple(pattern for pattern in patterns if not pattern.startswith("!"))
    exclude = tuple(pattern[1:] for pattern in patterns if pattern.startswith("!"))
    return BiasRule(include, exclude, everything=bool(exclude) and not include)


def module_rule(train_modules: str | Sequence[str]) -> ModuleRule:
    patterns = _patterns("train_modules", train_modules)
    if any("" in pattern.removeprefix("!").removeprefix(CLASS).split(ALTERNATIVE) for pattern in patterns):
        raise ConversionError(f"train_modules holds an empty pattern: {patterns!r}")
    include = tuple(pattern for pattern in patterns if not pattern.startswith("!"))
    exclude = tuple(pattern[1:] for pattern in patterns if pattern.startswith("!"))
    return ModuleRule(include or ("*",) if patterns else (), exclude)


def _selects(pattern: str, name: str, cls: type[nn.Module]) -> bool:
    """Whether one of the pattern's alternatives matches the module's name, or its class or a base of it."""
    names = _class_names(cls) if pattern.startswith(CLASS) else [name]
    return _any_match(pattern.removeprefix(CLASS).split(ALTERNATIVE), names)


def _class_names(cls: type[nn.Module]) -> list[str]:
    """Of the class and its bases; not of what all modules are."""
    return [cls.__name__, *(base.__name__ for base in cls.__mro__[1:] if base not in nn.Module.__mro__)]


def fnmatch_all(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def _patterns(argument: str, value: str | Sequence[str]) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, (tuple, list, set, frozenset)) or not all(isinstance(p, str) for p in patterns):
        raise ConversionError(f"{argument} must be a pattern or a tuple of patterns, not {value!r}")
    if "" in patterns or "!" in patterns:
        raise ConversionError(f"{argument} holds an empty pattern")
    return tuple(patterns)


def _any_match(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _spells_out(pattern: str, name: str) -> bool:
    """True if the pattern matches and ends in the parameter's own name, so that it cannot have matched by accident."""
    own = name.rsplit(".", 1)[-1]
    return pattern.endswith(own) and fnmatch.fnmatchcase(name, pattern)


def _near(pattern: str, names: Sequence[str]) -> str:
    plain = re.sub(r"[*?\[\]!]", "", pattern)
    near = difflib.get_close_matches(plain, list(dict.fromkeys(names)), n=3, cutoff=0.4)
    return f"; near it: {', '.join(near)}" if near else ""
