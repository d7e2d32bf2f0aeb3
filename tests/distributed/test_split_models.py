"""Native models split over the ranks of real process groups by their tensor parallel plans."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from tests.distributed.groups import Findings, run_group
from tests.distributed.split_models import (
    CAUSAL,
    CHECKPOINTS,
    FEED_FORWARD_ALONE,
    OF_FOUR_RANKS,
    write_checkpoints,
)

Groups = Callable[[int], list[Findings]]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    """What each rank of a group of so many found; a group runs once for all tests."""

    @cache
    def group(n_ranks: int) -> list[Findings]:
        folder = tmp_path_factory.mktemp("ranks")
        write_checkpoints(folder)
        return run_group("tests.distributed.split_models", n_ranks, folder)

    return group


@pytest.fixture(scope="module")
def two(groups: Groups) -> list[Findings]:
    return groups(2)


def of_each(condition: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    """What the ranks of 2 and of 4 found of each checkpoint."""
    names = [(2, name) for name in CHECKPOINTS] + [(4, name) for name in OF_FOUR_RANKS]
    cases = [pytest.param(case, id=f"{case[1]}, {case[0]} ranks") for case in names if condition(case[1])]
    return pytest.mark.parametrize("found", cases, indirect=True)


@pytest.fixture
def found(request: pytest.FixtureRequest, groups: Groups) -> list[Findings]:
    n_ranks, name = request.param
    return [findings[name] for findings in groups(n_ranks)]


def is_causal(name: str) -> bool:
    return CHECKPOINTS[name][1] == CAUSAL


@of_each()
def test_logits_are_those_of_one_process(found: list[Findings]) -> None:
    # Sums over ranks are made in another order than in one process.
    assert all(one["error"] < 1e-5 for one in found)


@of_each(is_causal)
def test_generated_tokens_are_those_of_one_process(found: list[Findings]) -> None:
    assert all(one["generates the same"] for one in found)


@of_each(is_causal)
def test_gradients_are_those_of_one_process(found: list[Findings]) -> None:
    assert all(one["differing gradients"] == [] for one in found)


@of_each()
def test_every_part_has_the_bytes_that_the_plan_gives_it(found: list[Findings]) -> None:
    assert all(one["n_laid_out"] > 0 and one["differing"] == [] for one in found)


@of_each()
def test_a_rank_reads_what_it_holds_and_no_more(found: list[Findings]) -> None:
    for one in found:
        assert one["n_bytes"] == one["n_owned_bytes"] < one["n_whole_bytes"]
        assert one["tp_size"] == len(found)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_a_dense_decoder_costs_each_rank_its_share(groups: Groups, n_ranks: int) -> None:
    for findings in groups(n_ranks):
        one = findings["llama"]
        # Norms are whole everywhere, and the vocabulary of 67 is one row longer on some ranks.
        assert one["n_bytes"] < one["n_whole_bytes"] / n_ranks * 1.05


@of_each(lambda name: "tied" in name or "gemma" in name)
def test_a_tied_head_stays_tied(found: list[Findings]) -> None:
    assert all(one["is tied"] for one in found)


def test_a_mesh_of_several_dimensions_splits_along_its_tp(groups: Groups) -> None:
    assert [findings["wrong in a grid"] for findings in groups(4)] == [[]] * 4


def test_ranks_agree_on_what_they_draw(two: list[Findings]) -> None:
    first, second = (findings["in use"]["sampled"] for findings in two)
    assert torch.equal(first["first"], second["first"])
    assert torch.equal(first["second"], second["second"])
    assert not torch.equal(first["first"], first["second"])


def test_a_seed_gives_the_tokens_of_one_process(two: list[Findings]) -> None:
    for findings in two:
        sampled = findings["in use"]["sampled"]
        assert torch.equal(sampled["seeded"], sampled["seeded in one process"])


def test_tokens_can_be_streamed(two: list[Findings]) -> None:
    for findings in two:
        assert torch.equal(findings["in use"]["streamed"], findings["in use"]["streamed in one process"])


def test_a_cache_is_made_for_the_heads_of_a_rank(two: list[Findings]) -> None:
    assert all(findings["in use"]["error with a cache"] < 1e-5 for findings in two)
    assert all("2 heads of keys, where the cache was made for 4" in findings["refusals"]["cache"] for findings in two)


def test_a_split_model_can_be_copied(two: list[Findings]) -> None:
    assert all(findings["in use"]["error of a copy"] < 1e-5 for findings in two)


def test_parts_are_converted(two: list[Findings]) -> None:
    assert all(findings["in use"]["wrong when converted"] == [] for findings in two)


def test_a_plan_of_ones_own_counts(two: list[Findings]) -> None:
    for findings in two:
        used = findings["in use"]
        assert used["own plan"] == FEED_FORWARD_ALONE
        assert used["own plan's error"] < 1e-5
        assert len(used["laid out by own plan"]) == 6
        assert all(".mlp." in name for name in used["laid out by own plan"])


REFUSED = {
    "style": "OptionError: unknown style in a tensor parallel plan",
    "pattern": "OptionError: a pattern of a tensor parallel plan fits no module of the model",
    "kind": "OptionError: the style 'colwise' of a tensor parallel plan is for another kind of module",
    "no experts": "OptionError: the style 'experts' of a tensor parallel plan is for another kind of module",
    "some of an attention": "OptionError: a tensor parallel plan cuts some of an attention's inputs and not the others",
    "no plan": "OptionError: LlamaForCausalLM has no tensor parallel plan",
    "no mapping": "OptionError: not a tensor parallel plan",
    "ties": "OptionError: a tensor parallel plan cuts a parameter in two ways that two modules share",
    "heads": "OptionError: a layer cannot be cut in so many equal parts",
    "inputs": "OptionError: a layer cannot be cut in so many equal parts",
    "mesh": "OptionError: a device mesh of several dimensions has to say over which of them a model is split",
    "no mesh": "OptionError: not a device mesh",
    "time": "OptionError: ranks that share a model have to end together, and each has a clock of its own",
    "vocabulary": "OptionError: the vocabulary of a model that is split over ranks cannot change",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused(two: list[Findings], case: str) -> None:
    assert all(findings["refusals"][case].startswith(REFUSED[case]) for findings in two)


def test_the_layer_that_cannot_be_cut_is_named(two: list[Findings]) -> None:
    for findings in two:
        assert "self_attn.k_proj" in findings["refusals"]["heads"]
        assert "num_key_value_heads = 3" in findings["refusals"]["heads"]
        assert "mlp.down_proj" in findings["refusals"]["inputs"]
        assert "47 inputs" in findings["refusals"]["inputs"]
