"""Concepts found by words over Ray Serve, in both placements, from the SDK and the command."""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

import whence
from concepts.bank import Bank
from concepts.clip import Clip
from concepts.repository import Repository
from tests.clips import tiny_clip
from tests.e2e.conftest import RunningServer, Start
from tests.e2e.named import LABELS, NAMED, PART, nearest, publish_named
from tests.e2e.repository import BANK, LAYER, MODEL, held_out

TREE = f"{MODEL}/{LAYER}/tree"
TEXTS = ("a photo of stripes", "red ring", "斑马")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def banks(repository: Path, clip: Clip) -> list[Bank]:
    """Two banks that were named, beside the one that was not."""
    files = Repository(repository)
    return [publish_named(files, clip), publish_named(files, clip, "tree", seed=1, parts=(PART,))]


@pytest.fixture(
    scope="module",
    params=[{"placement": "together"}, {"placement": "apart", "ingress_mode": "proxy"}],
    ids=["together", "apart"],
)
def server(request: pytest.FixtureRequest, start: Start, repository: Path, banks: list[Bank]) -> RunningServer:
    return start(repository, **request.param)


def test_what_is_found_is_what_double_precision_finds(server: RunningServer, banks: list[Bank], clip: Clip) -> None:
    with whence.Client(server.address, timeout_s=60) as client:
        for text in TEXTS:
            results = client.search(text, limit=100)
            expected = nearest(banks, clip, text)
            assert [(found.bank, found.concept.id) for found in results] == [each[1:] for each in expected]
            assert [found.score for found in results] == pytest.approx([each[0] for each in expected], abs=1e-6)
            (plain,) = results.unsearched
            assert (plain.reference, "whence-bank label" in plain.reason) == (BANK, True)
        exemplars = client.search(TEXTS[0], bank=NAMED, limit=1, max_exemplars=2)[0].concept.exemplars
        assert all(exemplar.picture[:4] == b"RIFF" for exemplar in exemplars)
        labelled = client.search("RED ring", by="label", limit=3)
        assert [(found.score, found.bank) for found in labelled][:2] == [(1.0, NAMED), (1.0, TREE)]
        assert client.search(PART, by="label")[0].concept.layer == "layer2"


def test_names_come_with_banks_concepts_and_explanations(server: RunningServer, banks: list[Bank], clip: Clip) -> None:
    with whence.Client(server.address, timeout_s=60) as client:
        labelling = client.bank(NAMED).labelling
        assert labelling == whence.Labelling(clip.name, clip.digest, 1234)
        assert client.bank(BANK).labelling is None
        weak, given = client.concept(NAMED, 2), client.concept(NAMED, 3)
        assert (weak.label, weak.name, weak.weak_label) == (LABELS[2], f"{LABELS[2]}?", True)
        assert (given.name, given.weak_label, given.named_by_person) == (LABELS[3], False, True)
        assert (len(weak.exemplars), len(weak.counterfactuals)) == (3, 2)
        concepts = client.explain(held_out()[0], bank=NAMED, target="airplane").concepts
    stored = {concept.id: concept for concept in banks[0].concepts}
    assert {score.id for score in concepts} <= {0, 1, 2, 3}
    for score in concepts:
        assert (score.label, score.weak_label) == (stored[score.id].label, stored[score.id].weak)
        assert score.words == stored[score.id].words


def test_refusals_are_typed(server: RunningServer) -> None:
    with whence.Client(server.address, timeout_s=60) as client:
        for error, fields in (
            (whence.InvalidArgument, {"limit": 0}),
            (whence.InvalidArgument, {"bank": "quick"}),
            (whence.NotFound, {"model": "none"}),
            (whence.NotFound, {"bank": f"{MODEL}/{LAYER}/none"}),
        ):
            with pytest.raises(error) as refused:
                client.search("ring", **fields)  # type: ignore[arg-type]
            assert refused.value.request_id


def test_explanations_are_answered_beside_many_searches(server: RunningServer) -> None:
    with whence.Client(server.address, timeout_s=60) as client, concurrent.futures.ThreadPoolExecutor(12) as pool:
        alone = client.search("text 0")
        searches = [pool.submit(client.search, f"text {n}") for n in range(40)]
        explained = [pool.submit(client.explain, path, bank=BANK) for path in held_out()]
        assert all(call.result().concepts for call in explained)
        assert [found.score for found in searches[0].result()] == [found.score for found in alone]
        assert all(len(call.result()) == 10 for call in searches)


def test_searches_are_counted(server: RunningServer) -> None:
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=10) as reply:
            text = str(reply.read().decode())
        if re.search(r'whence_requests_total{.*code="OK".*rpc="SearchConcepts"', text):
            break
        assert time.monotonic() < until
        time.sleep(0.2)


def test_the_command_finds_concepts(server: RunningServer) -> None:
    command = Path(sys.executable).parent / "whence"
    arguments = [command, "search", "red ring", "--by", "label", "--bank", NAMED, "--address", server.address]
    done = subprocess.run([*arguments, "--json"], capture_output=True, text=True, check=True)
    assert [each["concept"]["label"] for each in json.loads(done.stdout)["found"]] == [LABELS[1], LABELS[2], LABELS[5]]
    shown = subprocess.run(arguments, capture_output=True, text=True, check=True, env={"COLUMNS": "160"}).stdout
    assert "red ringlet?" in shown
    assert "A name with a question mark" in shown


def test_a_broken_clip_leaves_its_banks_alone_unsearched(
    start: Start, repository: Path, banks: list[Bank], tmp_path: Path
) -> None:
    shutil.copytree(repository, tmp_path / "repository")
    files = Repository(tmp_path / "repository")
    broken = tiny_clip(tmp_path / "broken", seed=4)
    broken.module.text_projection[:] = torch.nan  # type: ignore[operator, index]
    publish_named(files, broken, "broken", seed=3)
    server = start(files.root)
    with whence.Client(server.address, timeout_s=60) as client:
        results = client.search(TEXTS[0])
        assert len(results) == 10
        reasons = {each.reference: each.reason for each in results.unsearched}
        assert "NaN" in reasons[f"{MODEL}/{LAYER}/broken"]
        assert client.explain(held_out()[0], bank=BANK).concepts
    server.stop()
