"""What a study says of itself: the report's own sentences, with what each speaks of, so that the page can link them.

    GET /api/findings               the sections, without their sentences
    GET /api/findings/{analysis}    the sentences of one analysis
    GET /api/why?layer=3&head=7     why a head matters, or not

Sentences of a large study take seconds (intervals of every head), so each analysis is asked for by itself, computed
once, and kept.
"""

from typing import TYPE_CHECKING

import xarray as xr
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vitrail.analysis import BASE, analyses
from vitrail.app.answers import json_answer, parse_index
from vitrail.app.once import Once
from vitrail.heads.why import why_sentences, why_table
from vitrail.report.opening import accuracy
from vitrail.report.parts import ReportData
from vitrail.sentence import Sentence

if TYPE_CHECKING:
    from vitrail.app.server import AppState

__all__ = ["Findings", "routes"]


class Findings:
    """The sentences of one study; any thread may ask, and each analysis is computed once."""

    def __init__(self, study: ReportData) -> None:
        """Compute nothing yet.

        Args:
            study: The open study; of an unfinished one the sentences are about what is there.
        """
        self._study = study
        self._made = Once()

    def of_analysis(self, name: str) -> list[Sentence]:
        """The sentences that the report has of an analysis.

        Args:
            name: A registered analysis.

        Returns:
            Its sentences in order; none where the study holds nothing of it.
        """
        sentences: list[Sentence] = self._made.get(name, lambda: self._sentences(name))
        return sentences

    def why_table(self) -> xr.Dataset:
        """Everything that the study knows of each head.

        Returns:
            The table of `vitrail.heads.why.why_table`, computed once.
        """
        table: xr.Dataset = self._made.get("why", lambda: why_table(self._study.data))
        return table

    def why(self, layer: int, head: int) -> list[Sentence]:
        """Why a head matters, or not.

        Args:
            layer: Index of the layer.
            head: Index of the head.

        Returns:
            Sentences with their numbers.
        """
        return why_sentences(self._study.data, layer, head, table=self.why_table())

    def _sentences(self, name: str) -> list[Sentence]:
        if name == BASE:
            return [accuracy(self._study)]
        sections = [make(self._study) for make in analyses()[name].all_sections()]
        return [Sentence.of(text) for section in sections if section is not None for text in section.findings]


def routes(state: "AppState") -> list[Route]:
    """The routes of the findings.

    Args:
        state: What the server's routes share.

    Returns:
        Routes for the application.
    """
    findings = Findings(ReportData(state.folder, state.dataset, state.plan, state.manifest))

    async def sections(_request: Request) -> Response:
        held = [name for name, each in analyses().items() if name == BASE or any(map(_is_stored, each.measure_names))]
        return json_answer({"analyses": [{"name": name, "title": analyses()[name].title} for name in held]})

    def _is_stored(measure: str) -> bool:
        return measure in state.dataset

    async def of_analysis(request: Request) -> Response:
        name = request.path_params["analysis"]
        if name not in analyses():
            raise HTTPException(404, f"There is no analysis {name[:40]!r}. There are: {', '.join(analyses())}.")
        sentences = await run_in_threadpool(findings.of_analysis, name)
        return json_answer({"sentences": [sentence.to_json() for sentence in sentences]})

    async def why(request: Request) -> Response:
        n_heads = state.plan.n_heads
        layer = parse_index(request, "layer", len(n_heads))
        sentences = await run_in_threadpool(findings.why, layer, parse_index(request, "head", n_heads[layer]))
        return json_answer({"sentences": [sentence.to_json() for sentence in sentences]})

    return [
        Route("/api/findings", sections),
        Route("/api/findings/{analysis}", of_analysis),
        Route("/api/why", why),
    ]
