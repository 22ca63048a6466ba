"""Concepts found by words, and their names and counterfactuals, through a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from concepts.clip import Clip
from concepts.repository import Repository
from service.catalogue import Catalogue
from tests.clips import tiny_clip
from tests.e2e.named import LABELS, NAMED, PART, SILENT, nearest, publish_named
from tests.e2e.repository import BANK, LAYER, MODEL
from tests.service.conftest import Serve
from tests.service.test_ingress import refusal
from whence.v1 import explanation_service_pb2 as pb

TREE = f"{MODEL}/{LAYER}/tree"
OTHER = f"{MODEL}/{LAYER}/other"
TEXT = "a photo of stripes"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, Clip]:
    place = tmp_path_factory.mktemp("clips")
    return tiny_clip(place / "one"), tiny_clip(place / "two", seed=1)


@pytest.fixture(scope="module")
def named(small_repository: Path, clips: tuple[Clip, Clip], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a bank without names, two named with one CLIP, one of which has parts; not to be changed."""
    root = tmp_path_factory.mktemp("named") / "repository"
    shutil.copytree(small_repository, root)
    publish_named(Repository(root), clips[0])
    publish_named(Repository(root), clips[0], "tree", seed=1, parts=(PART, "whiskers"))
    return root


@pytest.fixture
def own(named: Path, tmp_path: Path) -> Repository:
    """A copy of that repository, to be changed."""
    shutil.copytree(named, tmp_path / "repository")
    return Repository(tmp_path / "repository")


def search(text: str = TEXT, **fields: Any) -> pb.SearchConceptsRequest:
    return pb.SearchConceptsRequest(text=text, **fields)


def found(reply: pb.SearchConceptsResponse) -> list[tuple[float, str, int]]:
    return [(each.score, each.bank.reference, each.concept.id) for each in reply.concepts]


def reasons(reply: pb.SearchConceptsResponse) -> dict[str, str]:
    return {each.reference: each.reason for each in reply.unsearched}


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


async def test_meanings_are_those_of_double_precision(named: Path, clips: tuple[Clip, Clip], serve: Serve) -> None:
    repository = Repository(named)
    banks = [repository.load(repository.resolve(reference)) for reference in (NAMED, TREE)]
    expected = nearest(banks, clips[0], TEXT)
    async with serve(named) as server:
        reply = await server.stub.SearchConcepts(search(f"  {TEXT}\n", limit=100))
        ten = await server.stub.SearchConcepts(search())
        again = await server.stub.SearchConcepts(search(limit=3))
        counts = server.counts
    # All but the silent concept of either, parts included.
    assert len(expected) == sum(len(bank.all_concepts) - 1 for bank in banks) == len(reply.concepts)
    assert [each[1:] for each in found(reply)] == [each[1:] for each in expected]
    assert [each[0] for each in found(reply)] == pytest.approx([each[0] for each in expected], abs=1e-6)
    assert all(id_ != SILENT for _, _, id_ in found(reply))
    assert found(ten) == found(reply)[:10]
    assert found(again) == found(reply)[:3]
    assert list(reasons(reply)) == [BANK]
    assert "whence-bank label" in reasons(reply)[BANK]
    assert counts.requests == {("SearchConcepts", "OK"): 3}


async def test_a_concept_is_found_with_what_is_known_of_it(named: Path, serve: Serve) -> None:
    version = Repository(named).resolve(NAMED)
    async with serve(named) as server:
        reply = await server.stub.SearchConcepts(search("pointed EAR", by=pb.SEARCH_BY_LABEL, bank=NAMED))
        pictures = await server.stub.SearchConcepts(search(LABELS[0], by=2, bank=NAMED, max_exemplars=2))
        told = (await server.stub.GetConcept(pb.GetConceptRequest(bank=NAMED, concept_id=3))).concept
        part = await server.stub.SearchConcepts(search(PART, by=pb.SEARCH_BY_LABEL))
        stored = server.repository.load(version).concept(0)
        files = server.repository.pictures(version, stored.pictures)
    (hit,) = reply.concepts
    assert (hit.score, hit.bank.reference, hit.bank.digest) == (1.0, NAMED, version.digest)
    assert (hit.concept.id, hit.concept.class_name, hit.concept.named_by_person) == (3, "airplane", True)
    assert (hit.concept.naming.label, hit.concept.naming.weak) == ("cat ear", True)
    assert [word.text for word in hit.concept.naming.words] == ["cat ear", "cat ears"]
    assert not hit.concept.exemplars
    assert not hit.concept.counterfactuals
    assert (len(told.exemplars), len(told.counterfactuals)) == (3, 2)
    first = pictures.concepts[0].concept
    assert [each.picture for each in first.exemplars] == [files[e.file] for e in stored.exemplars[:2]]
    assert not first.counterfactuals
    assert (part.concepts[0].concept.label, part.concepts[0].concept.layer) == (PART, "layer2")
    assert part.concepts[0].concept.parent == 0


async def test_labels_are_found_whatever_the_case(named: Path, serve: Serve) -> None:
    async with serve(named) as server:
        reply = await server.stub.SearchConcepts(search("red RING", by=pb.SEARCH_BY_LABEL, bank=NAMED))
        all_banks = await server.stub.SearchConcepts(search("red ring", by=pb.SEARCH_BY_LABEL, limit=3))
        others = await server.stub.SearchConcepts(search("cat ear", by=pb.SEARCH_BY_LABEL, bank=NAMED))
        none = await server.stub.SearchConcepts(search("unicorn", by=pb.SEARCH_BY_LABEL, bank=BANK))
    assert found(reply) == [(1.0, NAMED, 1), *((pytest.approx(0.8), NAMED, id_) for id_ in (2, SILENT))]
    assert [each[1:] for each in found(all_banks)] == [(NAMED, 1), (TREE, 1), (NAMED, 2)]
    assert not all_banks.unsearched, "the plain bank has labels"
    assert found(others) == [(pytest.approx(0.6), NAMED, 3)]
    assert not none.concepts


async def test_counterfactuals_and_how_a_bank_was_named_are_told(
    named: Path, clips: tuple[Clip, Clip], serve: Serve
) -> None:
    async with serve(named) as server:
        bank = (await server.stub.GetBank(pb.GetBankRequest(bank=NAMED))).bank
        plain = (await server.stub.GetBank(pb.GetBankRequest(bank=BANK))).bank
        ask = pb.GetConceptRequest(bank=NAMED, concept_id=0)
        whole = (await server.stub.GetConcept(ask)).concept
        ask.max_exemplars = 1
        first = (await server.stub.GetConcept(ask)).concept
        ask.max_exemplars = 0
        bare = (await server.stub.GetConcept(ask)).concept
        repository = server.repository
    assert (bank.labelling.clip, bank.labelling.clip_digest) == ("one", clips[0].digest)
    assert bank.labelling.captions == 1234
    assert not plain.HasField("labelling")
    version = repository.resolve(NAMED)
    stored = repository.load(version).concept(0)
    for sent, kept in ((whole.exemplars, stored.exemplars), (whole.counterfactuals, stored.counterfactuals)):
        assert [each.picture for each in sent] == [repository.picture(version, exemplar) for exemplar in kept]
        assert [each.activation for each in sent] == [exemplar.activation for exemplar in kept]
    assert [len(each.exemplars) for each in (whole, first, bare)] == [3, 1, 0]
    assert [len(each.counterfactuals) for each in (whole, first, bare)] == [2, 1, 0]
    assert whole.naming.label == LABELS[0]


async def test_several_clips_take_turns(own: Repository, clips: tuple[Clip, Clip], serve: Serve) -> None:
    other = publish_named(own, clips[1], "other", seed=2)
    banks = [own.load(own.resolve(reference)) for reference in (NAMED, TREE)]
    rankings = {clips[0].digest: nearest(banks, clips[0], TEXT), clips[1].digest: nearest([other], clips[1], TEXT)}
    one, two = (rankings[digest] for digest in sorted(rankings))
    expected = [hit for pair in zip(one, two, strict=False) for hit in pair][:7]
    async with serve(own.root) as server:
        reply = await server.stub.SearchConcepts(search(limit=7))
    assert [each[1:] for each in found(reply)] == [each[1:] for each in expected]
    assert [each[0] for each in found(reply)] == pytest.approx([each[0] for each in expected], abs=1e-6)


Damage = Callable[[Repository, str], Any]


def _files(repository: Repository, pattern: str) -> Path:
    (path,) = repository.root.glob(pattern)
    return path


DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "no CLIP": (lambda r, d: shutil.rmtree(r.root / "clips" / d), NAMED, "is not in the repository"),
    "other weights": (lambda r, d: flip_last_byte(r.root / "clips" / d / "weights.safetensors"), NAMED, "weights"),
    "other manifest": (lambda r, d: flip_last_byte(r.root / "clips" / d / "clip.json"), NAMED, "clip.json"),
    "no weights": (lambda r, d: (r.root / "clips" / d / "weights.safetensors").unlink(), NAMED, "missing"),
    "embeddings": (lambda r, d: flip_last_byte(_files(r, f"banks/{NAMED}/*/tensors.safetensors")), NAMED, "tensors"),
    "concepts": (lambda r, d: flip_last_byte(_files(r, f"banks/{NAMED}/*/concepts.jsonl")), NAMED, "concepts.jsonl"),
    "version": (lambda r, d: (r.root / f"banks/{NAMED}/CURRENT").write_text("none"), NAMED, "CURRENT"),
    "model": (lambda r, d: (r.root / f"models/{MODEL}/model.json").write_text("{"), NAMED, "model.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_damaged_is_said_and_the_rest_is_searched(
    damage: str, own: Repository, clips: tuple[Clip, Clip], serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    publish_named(own, clips[1], "other", seed=2)
    do, reference, says = DAMAGES[damage]
    do(own, clips[0].digest)
    async with serve(own.root) as server:
        reply = await server.stub.SearchConcepts(search(limit=100))
        counts = server.counts
    told = reasons(reply)
    assert says in told[reference]
    assert str(own.root) not in str(told)
    assert "Traceback" not in str(told)
    assert reference not in {bank for _, bank, _ in found(reply)}
    assert bool(reply.concepts) == (damage != "model")
    assert counts.requests == {("SearchConcepts", "OK"): 1}


async def test_a_bank_of_a_strange_form_hides_no_other(own: Repository, serve: Serve) -> None:
    bank = own.load(own.resolve(NAMED))
    pictures = own.pictures(own.resolve(NAMED), [e for c in bank.concepts for e in c.pictures])
    assert bank.embeddings is not None
    own.publish(replace(bank, labelling={"clip": "one"}), pictures)
    own.publish(replace(bank, name="other", embeddings=bank.embeddings.half()), pictures)
    async with serve(own.root) as server:
        reply = await server.stub.SearchConcepts(search(limit=100))
        listed = await server.stub.ListBanks(pb.ListBanksRequest())
    assert {each.bank.reference for each in reply.concepts} == {TREE}
    assert all("is damaged" in reasons(reply)[reference] for reference in (NAMED, OTHER))
    assert {TREE, OTHER, BANK} == {bank.reference for bank in listed.banks}


@pytest.mark.parametrize("broken", ["nan", "tower", "width"])
async def test_a_clip_that_cannot_embed_leaves_its_banks_unsearched(
    broken: str, own: Repository, tmp_path: Path, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    clip = tiny_clip(tmp_path / "broken", seed=3)
    module: Any = clip.module
    if broken == "nan":
        module.text_projection[:] = torch.nan
    elif broken == "tower":
        module.text_projection = torch.nn.Parameter(torch.zeros(3, 16), requires_grad=False)
    bank = publish_named(own, clip, "other", seed=2)
    if broken == "width":
        pictures = own.pictures(own.resolve(OTHER), [e for c in bank.concepts for e in c.pictures])
        assert bank.embeddings is not None
        own.publish(replace(bank, embeddings=bank.embeddings[:, :8]), pictures)
    async with serve(own.root) as server:
        reply = await server.stub.SearchConcepts(search(limit=5))
        label = await server.stub.SearchConcepts(search(LABELS[0], by=pb.SEARCH_BY_LABEL, bank=OTHER))
    assert "is damaged" in reasons(reply)[OTHER]
    assert len(reply.concepts) == 5
    assert label.concepts[0].bank.reference == OTHER, "labels need no CLIP"


async def test_a_new_version_is_searched_and_an_old_one_stays_within_reach(
    own: Repository, clips: tuple[Clip, Clip], serve: Serve
) -> None:
    old = own.load(own.resolve(NAMED))
    async with serve(own.root) as server:
        before = await server.stub.SearchConcepts(search(bank=NAMED))
        new = await asyncio.to_thread(publish_named, own, clips[0], seed=9)
        after = await server.stub.SearchConcepts(search(bank=NAMED))
        pinned = await server.stub.SearchConcepts(search(bank=f"{NAMED}@{old.digest[:12]}"))
    assert {each.bank.digest for each in after.concepts} == {new.digest}
    assert [each[2] for each in found(after)] == [each[2] for each in nearest([new], clips[0], TEXT)[:10]]
    assert found(pinned) == found(before)
    assert {each.bank.digest for each in pinned.concepts} == {old.digest}


async def test_a_model_or_a_bank_may_be_named(named: Path, serve: Serve) -> None:
    async with serve(named) as server:
        everything = await server.stub.SearchConcepts(search(limit=100))
        of_model = await server.stub.SearchConcepts(search(limit=100, model=MODEL))
        of_bank = await server.stub.SearchConcepts(search(limit=100, model=MODEL, bank=TREE))
        plain = await server.stub.SearchConcepts(search(bank=BANK))
    assert of_model == everything
    assert found(of_bank) == [each for each in found(everything) if each[1] == TREE]
    assert not of_bank.unsearched
    assert (len(plain.concepts), list(reasons(plain))) == (0, [BANK])


@pytest.mark.parametrize(
    ("fields", "code", "reason", "says"),
    [
        ({"text": ""}, "INVALID_ARGUMENT", "INVALID_INPUT", "between 1 and 1000"),
        ({"text": " \n\t "}, "INVALID_ARGUMENT", "INVALID_INPUT", "between 1 and 1000"),
        ({"text": "x" * 1001}, "INVALID_ARGUMENT", "INVALID_INPUT", "not 1001"),
        ({"limit": 0}, "INVALID_ARGUMENT", "INVALID_INPUT", "between 1 and 50"),
        ({"limit": 51}, "INVALID_ARGUMENT", "INVALID_INPUT", "between 1 and 50"),
        ({"by": 9}, "INVALID_ARGUMENT", "INVALID_INPUT", "by has the value 9"),
        ({"model": "none"}, "NOT_FOUND", "UNKNOWN_MODEL", MODEL),
        ({"model": "../../etc"}, "INVALID_ARGUMENT", "INVALID_INPUT", "model"),
        ({"bank": f"{MODEL}/layer9/named"}, "NOT_FOUND", "UNKNOWN_BANK", "layer9"),
        ({"bank": f"{NAMED}@{'0' * 64}"}, "NOT_FOUND", "UNKNOWN_BANK", "no version"),
        ({"bank": "quick"}, "INVALID_ARGUMENT", "INVALID_INPUT", "model/layer/name"),
        ({"bank": "m/l/n", "model": MODEL}, "NOT_FOUND", "UNKNOWN_BANK", "m/l/n"),
    ],
)
async def test_bad_input_gets_a_typed_answer(
    named: Path, serve: Serve, fields: dict[str, Any], code: str, reason: str, says: str
) -> None:
    async with serve(named, limits={"top_k": 50}) as server:
        got, message, info = await refusal(
            server.stub.SearchConcepts(pb.SearchConceptsRequest(**{"text": "x"} | fields))
        )
    assert (got.name, info.reason) == (code, reason)
    assert says in message
    assert str(named) not in message


async def test_a_bank_of_another_model_is_refused(own: Repository, serve: Serve) -> None:
    weights = own.load_model(MODEL).module.state_dict()
    own.publish_model(replace(own.model_spec(MODEL), name="twin"), weights)
    async with serve(own.root) as server:
        code, message, info = await refusal(server.stub.SearchConcepts(search(model="twin", bank=NAMED)))
        reply = await server.stub.SearchConcepts(search(model="twin"))
    assert (code.name, info.reason) == ("INVALID_ARGUMENT", "INVALID_INPUT")
    assert "not of model 'twin'" in message
    assert not reply.concepts
    assert not reply.unsearched


async def test_texts_of_any_characters_are_searched(named: Path, serve: Serve) -> None:
    async with serve(named) as server:
        for text in ("x" * 1000, "斑马", "🦓 \u200b", "\0", "a &amp; b", "<end_of_text>"):
            for by in (pb.SEARCH_BY_MEANING, pb.SEARCH_BY_LABEL):
                reply = await server.stub.SearchConcepts(search(text, by=by))
                assert len(reply.concepts) == 10 or by == pb.SEARCH_BY_LABEL


async def test_exemplars_are_read_for_those_who_ask_and_within_the_limit(own: Repository, serve: Serve) -> None:
    async with serve(own.root, limits={"reply_bytes": 4096}) as server:
        _, message, info = await refusal(server.stub.SearchConcepts(search(bank=NAMED, limit=40, max_exemplars=3)))
        few = await server.stub.SearchConcepts(search(bank=NAMED, limit=2, max_exemplars=1))
        for path in (own.root / "banks" / NAMED).glob("*/exemplars/*.webp"):
            path.unlink()
        without = await server.stub.SearchConcepts(search(bank=NAMED, limit=2))
        code, lost, _ = await refusal(server.stub.SearchConcepts(search(bank=NAMED, limit=2, max_exemplars=1)))
    assert (info.reason, "fewer exemplars" in message) == ("UNSUPPORTED_OPTION", True)
    assert [len(each.concept.exemplars) for each in few.concepts] == [1, 1]
    assert found(without) == found(few)
    assert (code.name, ".webp is missing" in lost) == ("DATA_LOSS", True)


async def test_many_searches_at_once_load_each_thing_once(
    named: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    for name in ("named", "load_clip"):
        real = getattr(Repository, name)

        def noting(self: Repository, *args: Any, name: str = name, real: Any = real) -> Any:
            loaded.append(name)
            return real(self, *args)

        monkeypatch.setattr(Repository, name, noting)
    async with serve(named) as server:
        calls = [server.stub.SearchConcepts(search(f"text {n % 3}")) for n in range(12)]
        replies = await asyncio.gather(*calls)
    assert sorted(loaded) == ["load_clip", "named", "named", "named"]
    assert all(found(replies[n]) == found(replies[n % 3]) for n in range(12))


async def test_the_half_of_a_clip_that_sees_is_not_kept(named: Path, clips: tuple[Clip, Clip]) -> None:
    clip = await Catalogue(Repository(named), refresh_s=0.0).clip(clips[0].digest)
    assert not any(name.startswith("visual") for name, _ in clip.module.named_parameters())
    assert torch.allclose(clip.embed_texts([TEXT]), clips[0].embed_texts([TEXT]), atol=1e-6)


async def test_what_is_said_of_a_bank_in_words_is_what_is_loaded(named: Path) -> None:
    repository = Repository(named)
    for reference in (NAMED, TREE, BANK):
        whole, bare = (read(repository.resolve(reference)) for read in (repository.load, repository.named))
        assert bare.all_concepts == whole.all_concepts
        assert (bare.digest, bare.labelling, bare.reference) == (whole.digest, whole.labelling, reference)
        assert [bare.layer_of(c.id) for c in whole.all_concepts] == [whole.layer_of(c.id) for c in whole.all_concepts]
        assert [bare.children(c.id) for c in whole.concepts] == [whole.children(c.id) for c in whole.concepts]
        assert (bare.embeddings is None) == (whole.embeddings is None)
        assert whole.embeddings is None or torch.equal(whole.embeddings, bare.embeddings)  # type: ignore[arg-type]
        assert not bare.tensors
        assert bare.parts is None or not bare.parts.tensors


def test_the_service_starts_without_open_clip() -> None:
    code = "import sys, service.replica, service.app; print('open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
