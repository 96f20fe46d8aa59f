"""What an analysis is, and the register of all of them: the one place that says what Vitrail can measure.

An `Analysis` declares its measures, the options that they depend on, what they need of a model, what computes them, and
how they are drawn and put into sentences. The study, the command line, the figures, the report, `vitrail look`, the
page and the documentation loop over the register; none of them knows an analysis by name.

Declarations need no torch: what computes or draws is imported when it is called. An analysis from outside is added by
`vitrail.register(mine)`, or by a package with an entry point in the group `vitrail.analyses`. Vitrail's own come in the
same way.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from vitrail.errors import UsageError
from vitrail.measure import PLACES, Measure

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr
    from torch import Tensor

    from vitrail.models.open import Vit
    from vitrail.tap.attention import Readers
    from vitrail.tap.tap import Replay, Tap

__all__ = [
    "BASE",
    "Analysis",
    "Calibrates",
    "Collector",
    "Figure",
    "Need",
    "Option",
    "SamplesImages",
    "TakesMasks",
    "all_options",
    "analyses",
    "analyses_named",
    "changed_options",
    "declaration",
    "declared_options",
    "in_order_of_declaration",
    "is_analysis",
    "is_of_other_models",
    "make_collectors",
    "measures",
    "measures_named",
    "places",
    "register",
    "resolve_options",
    "split_names",
    "unavailable",
    "unregister",
]

Value = TypeVar("Value")

GROUP = "vitrail.analyses"
"""The group of entry points whose objects are analyses, or tuples of them."""

CHOICES = ("label", "patch", "channel")
"""What numbers may depend on beside options: the label of the image, and the patch and channel that a look shows."""

BASE = "base"
"""The analysis whose measures every study has."""


@runtime_checkable
class Collector(Protocol):
    """Computes some measures of a batch of images; used for one batch after the other.

    Several collectors share one recorded plain pass (`readers`), then each may run passes of its own (`finish`).

    Attributes:
        measures: the names of the arrays that `finish` returns.
        replays: whether `finish` runs from the middle of the plain pass, so that its tokens must be kept.
    """

    measures: tuple[str, ...]
    replays: bool

    def readers(self) -> "Readers":
        """What to read in the plain pass.

        Returns:
            Readers, which the study joins with those of the other collectors.
        """

    def finish(self, tap: "Tap", replay: "Replay", logits: "Tensor", labels: "np.ndarray") -> "dict[str, np.ndarray]":
        """The batch's arrays by measure name, with the dimensions and the dtype of their declaration.

        Args:
            tap: the tap of the studied model.
            replay: the plain pass, to go on from any layer.
            logits: [image class], of the plain pass.
            labels: int64 [image], the model's own top-1 where the data set has none.

        Returns:
            Arrays that lead with the image dimension.
        """


@runtime_checkable
class TakesMasks(Protocol):
    """A collector that is handed the masks of each batch before its pass."""

    def take_masks(self, masks: "Sequence[np.ndarray | None]") -> None:
        """Instance ids [row column] of each image of the padded batch, resized and cropped as the image; or None.

        Args:
            masks: One for each image of the batch.
        """


@runtime_checkable
class SamplesImages(Protocol):
    """A collector that measures only some images of a study, chosen by their places in it.

    A place says more than a batch does: whichever process computes which part, and whatever images follow, the same
    images are chosen.
    """

    def take_places(self, places: "Sequence[int]") -> None:
        """Places in the study of the images of the coming batch, without those that only fill it up.

        Args:
            places: Counted from 0, in the order of the batch.
        """

    def refuse_few(self, n_images: int) -> None:
        """Refuses a study whose sample would be too small for what it is taken for.

        Args:
            n_images: Of the study.

        Raises:
            UsageError: There are too few; it says how many are needed and what to do.
        """


@runtime_checkable
class Calibrates(Protocol):
    """A collector that sees all images before it measures the first; its statistics are kept with the study.

    Attributes:
        measures: as in `Collector`.
    """

    measures: tuple[str, ...]

    def calibrate(self, tap: "Tap", images: "Tensor", n_images: int) -> None:
        """One padded batch of prepared images, of which the first `n_images` count.

        Args:
            tap: the tap of the studied model.
            images: prepared images.
            n_images: how many of them count; the others are padding.
        """

    def calibration_statistics(self) -> "dict[str, np.ndarray]":
        """The statistics of all batches.

        Returns:
            Arrays by name, which the study stores.
        """

    def load_calibration(self, arrays: "Mapping[str, np.ndarray]") -> None:
        """Goes on with statistics that were computed before.

        Args:
            arrays: of `calibration_statistics`.
        """


@dataclass(frozen=True)
class Option:
    """One choice that numbers depend on: part of the plan, of the command line and of the documentation.

    Attributes:
        name: as in the plan; on the command line with hyphens.
        choices: the valid values; the first is the default.
        help: one sentence for `vitrail study --help` and the documentation.
        hidden: set by Vitrail itself, not by the user.
    """

    name: str
    choices: tuple[str, ...]
    help: str
    hidden: bool = False

    @property
    def default(self) -> str:
        """The value where none is given."""
        return self.choices[0]


@dataclass(frozen=True)
class Need:
    """Something that a measure needs of the model, of the images or of the options.

    Attributes:
        name: as in `Measure.needs`.
        description: what it is, for the documentation: "a classifier".
        missing: given model, options and measure, why the need is not met; empty where it is.
        of_other_models: whether models, or options, without it have other measures in their place, so that nobody
            misses it unless the measure was asked for by name.
    """

    name: str
    description: str
    missing: "Callable[[Vit, Mapping[str, str], Measure], str]"
    of_other_models: bool = False


class Figure(NamedTuple):
    """A figure of a study, or of one image as a study of one.

    Attributes:
        stem: name of the file, without its ending.
        draw: takes the study; returns a matplotlib figure, or None where the study has nothing for it.
        one_image: whether it is drawn of one image (`vitrail look`) and not of a whole study.
        both: whether it is drawn of a study and of one image alike.
    """

    stem: str
    draw: "Callable[[xr.Dataset], Any]"
    one_image: bool = False
    both: bool = False


LookParts = Mapping[tuple[str, ...], Callable[[Any], "Mapping[str, np.ndarray | xr.DataArray]"]]
"""Functions of a `vitrail.one_image.OneImage` by the names of the image measures that they compute."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A question about a model, and everything that answers it.

    Attributes:
        name: what `--measures` calls it.
        title: for headings.
        question: the question that it answers.
        measures: what it stores for each image, or once over all images (`Measure.derived`).
        collectors: given model, names of measures that this model has, and all options: what computes them.
        options: the options that its numbers depend on; an option of the same name in two analyses is the same object.
        needs: needs that only its measures have; those of other analyses can be named too.
        accompanying: arrays that the store holds beside its measures.
        image_measures: what is computed of one image only (`vitrail.look`), too large or too slow for a study.
        look: computes the image measures of a `vitrail.one_image.OneImage`; leaves out those that the model lacks and
            says why (`OneImage.leave_out`).
        look_parts: in place of `look`, a function that imports and returns what computes them, by the names that are
            computed together: a page that shows one of them then waits for no other. A part that raises `Unsupported`
            is left out with that reason.
        derive: computes and stores its derived measures once all parts are complete, given the `StudyRun`.
        figures: the figures, or a function that imports and returns them.
        sections: functions of a study that return a section of the report or None, or a function that imports them.
        paper: the paper to cite.
        aliases: older names that `--measures` accepts too.
        only_for: the models that have it ("a WinT"); empty for any model.
        places: given the attributes of a study (its plan), what the places along dimensions of its measures are called
            or which values they stand for, by dimension; they become coordinates of the dataset. Dimensions without
            are counted from 0.
    """

    name: str
    title: str
    question: str
    measures: tuple[Measure, ...]
    collectors: "Callable[[Vit, Sequence[str], Mapping[str, str]], Sequence[Collector]] | None" = None
    options: tuple[Option, ...] = ()
    needs: tuple[Need, ...] = ()
    accompanying: tuple[Measure, ...] = ()
    image_measures: tuple[Measure, ...] = ()
    look: Callable[[Any], "Mapping[str, np.ndarray]"] | None = None
    look_parts: Callable[[], "LookParts"] | None = None
    derive: Callable[[Any], None] | None = None
    figures: Sequence[Figure] | Callable[[], Sequence[Figure]] = ()
    sections: Sequence[Callable[[Any], Any]] | Callable[[], Sequence[Callable[[Any], Any]]] = ()
    paper: str = ""
    aliases: tuple[str, ...] = ()
    only_for: str = ""
    places: "Callable[[Mapping[str, Any]], Mapping[str, Sequence[Any]]] | None" = None

    def __post_init__(self) -> None:
        options = tuple(option.name for option in self.options)
        for key in ("measures", "accompanying", "image_measures"):
            own = tuple(
                replace(
                    measure,
                    analysis=self.name,
                    depends_on=options if measure.depends_on is None else measure.depends_on,
                )
                for measure in getattr(self, key)
            )
            object.__setattr__(self, key, own)

    @property
    def measure_names(self) -> tuple[str, ...]:
        """The names of its measures, in order."""
        return tuple(measure.name for measure in self.measures)

    def all_look_parts(self) -> LookParts:
        """What computes its image measures, by the names that are computed together; imports it.

        Returns:
            Functions by the names of the arrays that each computes.
        """
        if self.look_parts is not None:
            return self.look_parts()
        return {} if self.look is None else {tuple(measure.name for measure in self.image_measures): self.look}

    def all_figures(self) -> tuple[Figure, ...]:
        """Its figures in drawing order; imports what draws them.

        Returns:
            Figures; none for an analysis without.
        """
        return tuple(self.figures() if callable(self.figures) else self.figures)

    def all_sections(self) -> tuple[Callable[[Any], Any], ...]:
        """The functions that make its sections of the report; imports them.

        Returns:
            Functions of a study; none for an analysis without.
        """
        return tuple(self.sections() if callable(self.sections) else self.sections)


@dataclass
class _Register:
    analyses: dict[str, Analysis] = field(default_factory=dict)
    discovered: bool = False
    is_loading: bool = False
    lock: RLock = field(default_factory=RLock)


_REGISTER = _Register()


def register(analysis: Analysis, *, replace_same_name: bool = False) -> Analysis:
    """Adds an analysis to the study, command line, figures, report, look, page and documentation of this process.

    Args:
        analysis: what to add.
        replace_same_name: take the place of an analysis of this name, as when a notebook cell runs again.

    Returns:
        The analysis, so that a declaration can be wrapped.

    Raises:
        UsageError: a name is taken or malformed, or a need is not known.

    Example:
        >>> import vitrail
        >>> contrast = vitrail.Analysis(name="contrast", title="Contrast", question="How dark?", measures=())
        >>> vitrail.register(contrast).name
        'contrast'
        >>> vitrail.unregister("contrast")
    """
    _discover()
    _add(analysis, replace_same_name)
    return analysis


def unregister(name: str) -> None:
    """Takes a registered analysis away again.

    Args:
        name: of the analysis.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in analyses():
        raise UsageError(f"There is no analysis called {name!r}. Analyses: {', '.join(analyses())}.")
    del _REGISTER.analyses[name]


def analyses() -> Mapping[str, Analysis]:
    """All analyses by name: Vitrail's own first, then those of installed packages and of this process.

    Returns:
        The register; not a copy.

    Raises:
        UsageError: an installed package's analysis cannot be loaded.
    """
    _discover()
    return _REGISTER.analyses


def measures() -> dict[str, Measure]:
    """Every measure by its name in the store.

    Returns:
        Declarations in the order of the analyses, those that every study has first.
    """
    return {measure.name: measure for analysis in analyses().values() for measure in analysis.measures}


def places(dataset: "xr.Dataset", attributes: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What the places along a study's dimensions are called.

    Args:
        dataset: its arrays.
        attributes: its plan, as `vitrail.open_study` has it in `attrs`.

    Returns:
        Names or values by dimension, of those that have any. Those of another number than the study has places, as in
        a study of another version, are left out.
    """
    held = set(map(str, dataset.data_vars))
    names: dict[str, Sequence[Any]] = {}
    for analysis in analyses().values():
        if analysis.places is not None and held.intersection(analysis.measure_names):
            names = {**analysis.places(attributes), **names}
    names = {**PLACES, **names}
    return {dim: list(values) for dim, values in names.items() if dataset.sizes.get(dim) == len(values)}


def in_order_of_declaration(by_name: Mapping[str, Value]) -> dict[str, Value]:
    """A mapping by names of measures in the order of `measures`, whoever asked for them in which order.

    Args:
        by_name: anything by names of measures; names that no analysis declares come last.

    Returns:
        The same entries.
    """
    order = {name: place for place, name in enumerate(measures())}
    return dict(sorted(by_name.items(), key=lambda item: order.get(item[0], len(order))))


def declaration(name: str) -> Measure:
    """The declaration of any array of a study: a measure, or an array that accompanies one.

    Args:
        name: of the array.

    Returns:
        Its declaration.

    Raises:
        UsageError: no analysis declares it.
    """
    for analysis in analyses().values():
        for measure in (*analysis.measures, *analysis.accompanying, *analysis.image_measures):
            if measure.name == name:
                return measure
    raise UsageError(
        f"No analysis declares an array called {name!r}. If it comes from another package, install it; measures: "
        f"{', '.join(measures())}."
    )


def measures_named(names: str | Iterable[str]) -> tuple[Measure, ...]:
    """The measures that `--measures` asks for; the base measures come along.

    Args:
        names: analyses, measures, or a mix; a string is split at commas.

    Returns:
        Each measure once, in the order asked for.

    Raises:
        UsageError: a name is neither an analysis nor a measure.
    """
    declared = measures()
    wanted = dict.fromkeys(analyses()[BASE].measures)
    for name in split_names(names):
        analysis = _by_name_or_alias(name)
        if analysis is None and name not in declared:
            close = difflib.get_close_matches(name, (*_askable(), *declared))
            guess = f" Did you mean {' or '.join(close)}?" if close else ""
            raise UsageError(
                f"There is no measure called {name!r}.{guess} Analyses: {', '.join(_askable())}. Or one of their "
                f"{len(declared)} measures, which docs/measures.md lists and `vitrail.measures()` gives. An analysis "
                "of your own is there once it is registered."
            )
        wanted |= dict.fromkeys(analysis.measures if analysis else (declared[name],))
    return tuple(wanted)


def split_names(names: str | Iterable[str]) -> list[str]:
    """Splits names at commas and strips white space.

    Args:
        names: comma-separated, or in a sequence.

    Returns:
        Names in their order, without empty ones.
    """
    stripped = (name.strip() for name in (names.split(",") if isinstance(names, str) else names))
    return [name for name in stripped if name]


def is_analysis(name: str) -> bool:
    """Whether an analysis has this name or alias.

    Args:
        name: of an analysis, perhaps.

    Returns:
        False for names of measures and for unknown names.
    """
    return _by_name_or_alias(name) is not None


def analyses_named(names: str | Iterable[str]) -> tuple[Analysis, ...]:
    """The analyses of these names or aliases, each once.

    Args:
        names: comma-separated, or in a sequence.

    Returns:
        Analyses in the order of the names.

    Raises:
        UsageError: a name is no analysis, or there is none.
    """
    split = split_names(names)
    unknown = [name for name in split if not is_analysis(name)]
    if unknown or not split:
        raise UsageError(
            f"There is no analysis {', '.join(unknown) or 'asked for'}; choose from {', '.join(_askable())}."
        )
    named = [analysis for name in split if (analysis := _by_name_or_alias(name)) is not None]
    return tuple({analysis.name: analysis for analysis in named}.values())


def all_options() -> dict[str, Option]:
    """Every option of every analysis by name.

    Returns:
        Options of built-in analyses and of those from outside.
    """
    return {option.name: option for analysis in analyses().values() for option in analysis.options}


def resolve_options(options: Mapping[str, str] | None = None) -> dict[str, str]:
    """All options with their values, defaults filled in.

    Args:
        options: values that differ from the default, by name.

    Returns:
        A value for every option of every analysis.

    Raises:
        UsageError: an option or a value is not known.
    """
    known = all_options()
    for name, value in (options or {}).items():
        if name not in known or value not in known[name].choices:
            valid = "; ".join(f"{option.name}: {', '.join(option.choices)}" for option in known.values())
            raise UsageError(f"There is no option {name}={value!r}. Options: {valid}.")
    return {name: option.default for name, option in known.items()} | dict(options or {})


def changed_options(options: Mapping[str, str] | None) -> dict[str, str]:
    """The options that are not at their default, checked: as a plan holds them.

    Args:
        options: values by name; None for none.

    Returns:
        Those that differ from the default.

    Raises:
        UsageError: an option or a value is not known.
    """
    resolve_options(options)
    known = all_options()
    return {name: value for name, value in (options or {}).items() if value != known[name].default}


def declared_options(options: Mapping[str, str]) -> dict[str, str]:
    """The options of a plan that an analysis here declares; others are of analyses that are not installed.

    Args:
        options: values by name.

    Returns:
        Those that `resolve_options` takes.
    """
    known = all_options()
    return {name: value for name, value in options.items() if name in known}


def unavailable(vit: "Vit", names: Iterable[str], options: Mapping[str, str] | None = None) -> dict[str, str]:
    """Measures that this model, or these options, cannot give.

    Args:
        vit: the model.
        names: of measures.
        options: values that differ from the default, by name.

    Returns:
        The reason by measure; empty where all can be computed.

    Raises:
        UsageError: a measure, an option or a value is not known.
    """
    resolved, reasons = resolve_options(options), dict[str, str]()
    needs = {need.name: need for analysis in analyses().values() for need in analysis.needs}
    for name in names:
        measure = declaration(name)
        reason = next((why for need in measure.needs if (why := needs[need].missing(vit, resolved, measure))), "")
        if reason:
            reasons[name] = reason
    return reasons


def is_of_other_models(name: str) -> bool:
    """Whether models that lack this measure have others in its place.

    Args:
        name: of an array.

    Returns:
        True for measures of a special kind of output, such as the value of a regression.

    Raises:
        UsageError: no analysis declares the array.
    """
    others = {need.name for each in analyses().values() for need in each.needs if need.of_other_models}
    return bool(others & set(declaration(name).needs))


def make_collectors(vit: "Vit", names: Iterable[str], options: Mapping[str, str] | None = None) -> "list[Collector]":
    """What computes these measures, of all analyses; measures that the model cannot give are passed over.

    Args:
        vit: the model.
        names: of measures; `unavailable` says which of them are passed over, and why.
        options: values that differ from the default, by name.

    Returns:
        Collectors that share one plain pass.

    Raises:
        UsageError: a measure, an option or a value is not known.
    """
    names, resolved = list(dict.fromkeys(names)), resolve_options(options)
    left_out = unavailable(vit, names, options)
    result: list[Collector] = []
    for analysis in analyses().values():
        own = [each.name for each in analysis.measures if not each.derived]
        wanted = [name for name in names if name in own and name not in left_out]
        if wanted and analysis.collectors is not None:
            result.extend(analysis.collectors(vit, wanted, resolved))
    return result


# --- the register ----------------------------------------------------------------------------------------------------


def _by_name_or_alias(name: str) -> Analysis | None:
    known = analyses()
    return known.get(name) or next((each for each in known.values() if name in each.aliases), None)


def _discover() -> None:
    """Loads the analyses of installed packages, Vitrail's own first; once a process, whichever thread is first."""
    if not _REGISTER.discovered:
        with _REGISTER.lock:  # other threads wait; this one may come here again while it loads
            if not _REGISTER.discovered and not _REGISTER.is_loading:
                _load_all()


def _load_all() -> None:
    _REGISTER.is_loading = True
    try:
        points = sorted(entry_points(group=GROUP), key=lambda point: (_package(point) != "vitrail", _package(point)))
        for point in points:
            declared = _load(point)
            for analysis in declared if isinstance(declared, tuple) else (declared,):
                _add(analysis, False)
        _refuse_broken_installation()
        _REGISTER.discovered = True
    except BaseException:
        _REGISTER.analyses.clear()
        raise
    finally:
        _REGISTER.is_loading = False


def _refuse_broken_installation() -> None:
    if BASE not in _REGISTER.analyses:
        raise UsageError("Vitrail's own analyses were not found: its installation is out of date. Install it again.")


def _askable() -> list[str]:
    return [name for name in analyses() if name != BASE]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else ""


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise UsageError(
            f"The analysis {point.value} of the installed package {_package(point)} cannot be loaded: {error!r}. Mend "
            "or uninstall that package."
        ) from error


def _add(analysis: Analysis, replace_same_name: bool) -> None:
    if not isinstance(analysis, Analysis):
        raise UsageError(f"{analysis!r} is no vitrail.Analysis.")
    others = {name: each for name, each in _REGISTER.analyses.items() if name != analysis.name or not replace_same_name}
    _check_names(analysis, others)
    _check_options(analysis, others)
    _check_dependencies(analysis)
    _check_needs(analysis, others)
    _REGISTER.analyses[analysis.name] = analysis


def _check_names(analysis: Analysis, others: Mapping[str, Analysis]) -> None:
    taken = {name for each in others.values() for name in (each.name, *each.aliases, *_array_names(each))}
    names = [analysis.name, *analysis.aliases, *_array_names(analysis)]
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UsageError(f"{name!r} is no name for an analysis or a measure: lower case, digits and underscores.")
        if name in taken or names.count(name) > 1:
            raise UsageError(f"The name {name!r} of the analysis {analysis.name!r} is taken; choose another.")


def _check_dependencies(analysis: Analysis) -> None:
    known = {*(option.name for option in analysis.options), *CHOICES}
    for measure in (*analysis.measures, *analysis.accompanying, *analysis.image_measures):
        unknown = sorted(set(measure.depends_on or ()) - known)
        if unknown:
            raise UsageError(
                f"The measure {measure.name!r} depends on {', '.join(unknown)}, which {analysis.name!r} does not have; "
                f"choose from {', '.join(sorted(known))}."
            )


def _array_names(analysis: Analysis) -> list[str]:
    return [measure.name for measure in (*analysis.measures, *analysis.accompanying, *analysis.image_measures)]


def _check_options(analysis: Analysis, others: Mapping[str, Analysis]) -> None:
    known = {option.name: option for each in others.values() for option in each.options}
    for option in analysis.options:
        if not option.choices:
            raise UsageError(f"The option {option.name!r} of the analysis {analysis.name!r} has no choices.")
        if known.get(option.name, option) != option:
            raise UsageError(f"The analysis {analysis.name!r} has another option of the name {option.name!r}.")


def _check_needs(analysis: Analysis, others: Mapping[str, Analysis]) -> None:
    known = {need.name: need for each in (*others.values(), analysis) for need in each.needs}
    for measure in analysis.measures:
        unknown = sorted(set(measure.needs) - set(known))
        if unknown:
            raise UsageError(
                f"The measure {measure.name!r} needs {', '.join(unknown)}, which no analysis explains; needs: "
                f"{', '.join(known)}."
            )
