"""Scoring in worker processes and on Ray: a worker that is killed costs nothing but time."""

from __future__ import annotations

import psutil
import pytest

pytest.importorskip("torch", reason="scoring needs torch")
pytest.importorskip("transformers", reason="scoring needs transformers")

from generators import models

from echolab import jobs
from echolab.entropy.scorer import Scorer, ScorerConfig
from echolab.errors import EcholabError
from echolab.scoring import score
from echolab.sql import Session
from echolab.store import Store
from pipelines import backends
from pipelines.backends import choose_backend

NUMBERS = (
    "SELECT completion, token_ids, entropies, scores.logprobs FROM scores JOIN rollouts USING (rollout_id) ORDER BY completion"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ScorerConfig:
    return ScorerConfig(model=str(models.model(tmp_path_factory.mktemp("model") / "tiny")), threads=1)


@pytest.fixture
def store(make_store, monkeypatch) -> Store:
    """Twenty groups of two, one work item each."""
    cut = jobs.items
    monkeypatch.setattr(jobs, "items", lambda groups, tokens: cut(groups, tokens, 1))
    words = models.WORDS.split()
    return make_store(
        {"group": f"g{i // 2}", "sample": i % 2, "prompt": "x =", "completion": " ".join(words[: i % 9 + 1]) + f" {i}"}
        for i in range(40)
    )


def stored(store: Store) -> list[tuple]:
    with Session(store.snapshot()) as session:
        return session.sql(NUMBERS).rows()


def kill_one_worker(name: str) -> bool:
    """SIGKILL for one process below this one (Ray's daemon is) whose command line holds `name`."""
    for process in psutil.Process().children(recursive=True):
        if any(name in part for part in process.cmdline()):
            process.kill()
            return True
    return False


@pytest.mark.parametrize(
    ("backend", "worker"),
    [
        pytest.param("process", "spawn_main", marks=pytest.mark.slow),
        pytest.param("ray", "ray::Actor", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_a_worker_that_is_killed_is_replaced_and_the_table_is_the_serial_one(store, config, backend, worker):
    if backend == "ray":
        pytest.importorskip("ray", reason="Ray is not installed")
    report, _ = score(store, config)
    assert (report.rows, report.failed) == (40, {})
    expected = stored(store)
    for table in ("scores", "segmentations"):
        with store.lock():
            store.commit(table, [], replaces=store.snapshot().files(table))
    job = jobs.jobs(store, "score")[0]
    job.remove()
    killed = []

    def kill(done: int, total: int, rate: float) -> None:
        if done and not killed:
            killed.append(kill_one_worker(worker))

    report, _ = score(store, config, progress=kill, backend=choose_backend(backend, workers=2))
    assert killed == [True]
    assert (report.rows, report.failed) == (40, {})
    assert stored(store) == expected


def test_workers_share_the_cores_and_the_gpus(config, monkeypatch):
    monkeypatch.setattr(backends.os, "cpu_count", lambda: 8)
    free = ScorerConfig(model=config.model)
    assert [backends._config_of(free, i, 4)["threads"] for i in range(4)] == [2, 2, 2, 2]
    assert backends._config_of(config, 0, 4)["threads"] == 1
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [backends._config_of(free, i, 4)["device"] for i in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]


@pytest.mark.slow
def test_workers_that_cannot_load_the_model_end_the_job_with_one_line(tmp_path):
    with pytest.raises(EcholabError, match="a worker cannot load the model: .*no such folder"):
        list(backends.process(ScorerConfig(model=str(tmp_path / "gone")), 2)((i, None) for i in range(20)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_workers_that_die_one_after_the_other_end_the_job_with_one_line(config, monkeypatch):
    take = backends._Worker.give

    def kill(worker, payload) -> None:
        worker.process.kill()
        take(worker, payload)

    monkeypatch.setattr(backends._Worker, "give", kill)
    with pytest.raises(EcholabError, match="5 workers in a row died"):
        list(backends.process(config, 2)((i, None) for i in range(20)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_worker_whose_model_is_another_one_scores_nothing(config):
    with pytest.raises(EcholabError, match="a worker cannot load the model: .* is another model there"):
        list(backends.process(config, 1, "other")((i, None) for i in range(2)))  # type: ignore[arg-type]


def test_workers_are_told_what_auto_came_to(config):
    scorer = Scorer.load(config)
    assert (config.dtype, backends._as_here(config, scorer).dtype) == ("auto", "float32")


def test_a_cluster_gets_as_many_actors_as_it_has_room_for():
    assert backends._places({"CPU": 1.0}, 2) == ("cpu", 1)
    assert backends._places({"CPU": 16.0}, None) == ("cpu", 8)
    assert backends._places({"CPU": 16.0, "GPU": 4.0}, None) == ("gpu", 4)
    assert backends._places({"CPU": 16.0, "GPU": 4.0}, 3) == ("gpu", 3)


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two CPUs, one of them taken."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    class Holder:
        def here(self) -> bool:
            return True

    holder = ray.remote(num_cpus=1)(Holder).remote()
    assert ray.get(holder.here.remote())
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_actors_without_a_place_do_not_hold_up_the_others(cluster, store, config, tmp_path):
    report, _ = score(store, config, backend=choose_backend("ray", workers=2))
    assert (report.rows, report.failed) == (40, {})
    with pytest.raises(EcholabError, match="a worker cannot load the model: .*no such folder"):
        list(backends.on_ray(ScorerConfig(model=str(tmp_path / "gone")), 2, None)((i, None) for i in range(9)))  # type: ignore[arg-type]
