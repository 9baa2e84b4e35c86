"""The Python API: `echolab.open("store")` gives a Lab. The command line is a thin skin over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echolab.errors import EcholabError
from echolab.plan import IngestConfig
from echolab.sql import Options, Session
from echolab.store import Snapshot, Store

if TYPE_CHECKING:
    import polars as pl
    from altair import TopLevelMixin

    from echolab.clips.curate import CurateReport
    from echolab.clips.mine import Mined
    from echolab.export.run import ExportReport
    from echolab.generate import GenerateReport
    from echolab.ingest import IngestReport, Progress
    from echolab.jobs import Report as ScoreReport
    from echolab.profile_compare import Comparison
    from echolab.profiles import Profile
    from echolab.report.build import Report
    from echolab.report.notebook import ReaderPage
    from echolab.verify import VerifyReport


class Lab:
    """A store with its questions. Answers show the newest state, unless the lab was opened at an earlier one."""

    def __init__(self, store: Store, version: int | None = None, at: datetime | None = None):
        self.store = store
        self._fixed = store.snapshot(version, at) if version is not None or at is not None else None
        self._session: tuple[Any, Session] | None = None

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False, version: int | None = None, at: datetime | None = None) -> Lab:
        """Open a store; `create` makes an empty one where there is none."""
        return cls(Store.create(path) if create else Store.open(path), version, at)

    @property
    def snapshot(self) -> Snapshot:
        return self._fixed or self.store.snapshot()

    def session(self, options: Options | None = None) -> Session:
        """A DuckDB session over the snapshot. It is kept until the store changes or other options are asked for."""
        snapshot, options = self.snapshot, options or Options()
        key = (dict(snapshot.versions), options)
        if self._session is None or self._session[0] != key:
            self.close()
            self._session = key, Session(snapshot, options)
        return self._session[1]

    def sql(
        self,
        query: str,
        *,
        verifier: str | None = None,
        scorer: str | None = None,
        segmenter: str | None = None,
        success_threshold: float | None = None,
        tol: float = 1e-6,
    ) -> pl.DataFrame:
        """One SELECT over the views. A chosen verifier's word takes the place of the recorded rewards; `tol` and
        `success_threshold` judge otherwise than the run says.

        >>> lab.sql("SELECT kind, count(*) AS n FROM groups WHERE run = 'base' GROUP BY kind ORDER BY kind").rows()
        [('all_fail', 12), ('all_success', 10), ('mixed', 3)]
        """
        return self.session(Options(tol, success_threshold, verifier, scorer, segmenter)).sql(query)

    def query(
        self,
        name: str,
        /,
        *,
        verifier: str | None = None,
        scorer: str | None = None,
        segmenter: str | None = None,
        **params: Any,
    ) -> pl.DataFrame:
        """A named query; `echolab query --list` shows them.

        >>> lab.query("degenerate_by_step", run="base").select("step", "n_groups", "share_degenerate").rows()[:2]
        [(1, 4, 0.75), (2, 4, 0.5)]
        """
        return self.session(Options(verifier=verifier, scorer=scorer, segmenter=segmenter)).query(name, **params)

    def ingest(
        self, paths: str | Path | Sequence[str | Path], *, run: str, progress: Progress | None = None, **options: Any
    ) -> IngestReport:
        """Dumps of any trainer into the store. Options are those of `echolab ingest`, e.g. `step=400, role="expert"`;
        `rename` is its `--as`.

        >>> lab.ingest("new.jsonl", run="again").rows
        52
        """
        from echolab.ingest import ingest

        self._require_newest()
        given = [paths] if isinstance(paths, str | Path) else paths
        return ingest(self.store, given, IngestConfig.make(run=run, **options), progress)

    def watch(
        self, paths: str | Path | Sequence[str | Path], *, run: str, every: float = 10.0, **options: Any
    ) -> Iterator[IngestReport]:
        """Follow the dumps of a live run: a report each time that something new was read, until you stop asking."""
        from echolab.watch import watch

        given = [paths] if isinstance(paths, str | Path) else paths
        return watch(self.store, given, IngestConfig.make(run=run, **options), every)

    def generate(self, model: str | Path, prompts: str | Path, *, run: str, **options: Any) -> GenerateReport:
        """Rollouts of a model on a file of prompts, `n` of each, with their entropies. What the store has is not sampled
        again. Options are those of `echolab generate`, e.g. `n=8, temperature=0.7`."""
        from echolab.generate import GenerateConfig, Generation

        self._require_newest()
        config = GenerateConfig.make(model=str(model), prompts=str(prompts), run=run, **options)
        return Generation.load(config).run(self.store)

    def verify(self, verifier: str, **options: Any) -> VerifyReport:
        """Verdicts of `math`, `exact`, `numeric`, `choice` or `python:module:function` on rollouts that have none yet.
        Arguments are those of `echolab.verify.verify`, e.g. `run="base", timeout=5, options={"float_rounding": 4}`.

        >>> report = lab.verify("exact", run="new")
        >>> report.right, report.wrong
        (32, 20)
        """
        from echolab.verify import verify

        self._require_newest()
        return verify(self.store, verifier, **options)

    def score(self, model: str | Path, *, where: str | None = None, **options: Any) -> tuple[ScoreReport, str]:
        """Entropy and log-probability of every completion token of the rollouts that this model has not scored yet, and the
        scorer's id. `where` is SQL over the view `rollouts`; options are those of `echolab.entropy.scorer.ScorerConfig`,
        e.g. `temperature=0.7`."""
        from echolab.entropy.scorer import ScorerConfig
        from echolab.scoring import score

        self._require_newest()
        return score(self.store, ScorerConfig.make(model=str(model), **options), where)

    def profile(self, name: str, where: str, **options: Any) -> Profile:
        """Segment entropy over position, of the rollouts for which `where` holds, kept as `name@1`, `name@2`, ... Arguments
        are those of `echolab.profiles.profile`, e.g. `scorer="base", bins=32`.

        >>> lab.profile("solutions", "role = 'expert' AND success", scorer="scorer0").label
        'solutions@1'
        """
        from echolab.profiles import profile

        self._require_newest()
        return profile(self.store, name, where, **options)

    def compare_profiles(self, a: str, b: str, **options: Any) -> Comparison:
        """How far apart two profiles are, and whether by chance. Options are those of
        `echolab.profile_compare.compare`: `bins`, `permutations`, `seed`.

        >>> sorted(lab.compare_profiles("golden", "own").distances)
        ['max_abs', 'mse', 'one_minus_pearson']
        """
        from echolab.profile_compare import compare

        return compare(self.snapshot, a, b, **options)

    def curate(
        self,
        clipset: str,
        name: str,
        *,
        listing: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        **rules: Any,
    ) -> CurateReport:
        """A clip set from a clip set. Rules are those of `echolab.clips.rules.Rules`, e.g. `against=["aime24.jsonl"]`; the
        file `listing` gets a line of JSON for each dropped clip.

        >>> lab.curate("hard", "ready", dedup=True).clipset
        'ready@1'
        """
        from echolab.clips.curate import curate
        from echolab.clips.rules import Rules

        self._require_newest()
        return curate(self.store, clipset, name, Rules.make(**rules), listing=listing, progress=progress)

    def mine(self, name: str, **options: Any) -> Mined:
        """Clips of the scored successes, kept as `name@1`, `name@2`, ... Arguments are those of `echolab.clips.mine.mine` and
        of its `Selector`, e.g. `verifier="math", top_k=2`.

        >>> lab.mine("late", selector="peak", run="base", where="step > 3", scorer="scorer0").facts["outcomes"]
        {'clip': 6, 'no_success': 7}
        """
        from echolab.clips.mine import mine

        self._require_newest()
        return mine(self.store, name, **options)

    def export(self, out: str | Path, to: str, *, progress: Progress | None = None, **options: Any) -> ExportReport:
        """A dataset in the new folder `out`. Options are those of `echolab.export.config.ExportConfig`, e.g.
        `what="rollouts", where="success", best=1`.

        >>> lab.export("dataset", "jsonl", clipset="hard").splits
        {'train': 43}
        """
        from echolab.export.config import ExportConfig
        from echolab.export.run import export

        self._require_newest()
        return export(self.store, out, ExportConfig.make(to=to, **options), progress)

    def report(self, out: str | Path, **options: Any) -> Report:
        """The whole store as one HTML file. Options are those of `echolab.report.build.report`, e.g.
        `verifier="math", clipset="hard", static="figures"`.

        >>> lab.report("report.html", runs=["base"]).n_groups
        25
        """
        from echolab.report.build import report

        return report(self.snapshot, out, **options)

    def chart(
        self,
        name: str,
        *,
        run: str | None = None,
        verifier: str | None = None,
        scorer: str | None = None,
        segmenter: str | None = None,
    ) -> TopLevelMixin:
        """One chart of the report, as Altair draws it. A wrong name lists them.

        >>> lab.chart("degenerate_by_step", run="base").save("chart.html")
        """
        from echolab.chartdata import Answers
        from echolab.charts import chart

        session = self.session(Options(verifier=verifier, scorer=scorer, segmenter=segmenter))
        return chart(Answers.of(session, None if run is None else [run]), name)

    def reader(self, group_id: str, **options: Any) -> ReaderPage:
        """The rollouts of a group side by side, tokens coloured by entropy, in the cell of a notebook. The first characters
        of the id are enough; options are `clipset`, `verifier`, `scorer` and `segmenter`."""
        from echolab.report.notebook import reader_page

        return reader_page(self.snapshot, group_id, **options)

    def _require_newest(self) -> None:
        if self._fixed is not None:
            raise EcholabError("this lab looks at an earlier state of its store: open it without version or at to write")

    def info(self) -> dict[str, Any]:
        """What the store holds: runs, readings, tables, pins."""
        from echolab.maintenance import info

        return info(self.snapshot)

    def validate(self) -> list[str]:
        """Every way in which the store is not sound, one line each; empty when it is."""
        from echolab.validate import validate

        return validate(self.snapshot)

    def close(self) -> None:
        if self._session is not None:
            self._session[1].close()
            self._session = None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Lab({str(self.store.root)!r})"
