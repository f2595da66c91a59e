"""The generator's engine is real vLLM in a process of its own; this process is the learner that publishes to it.

transformers is the oracle: a recorded log-prob must be its log-prob, under the very weights that the version span names.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import pytest
import torch

from learner.publishing import WeightSender
from tests.actors.stage import Keeper, StagedGenerator
from tests.actors.worlds import (
    TEMPERATURE,
    Rows,
    lease,
    load_model,
    oracle,
    perturb,
    preprocessor_of,
    settings,
    write_model,
)
from vtriune.data.processing import Preprocessor
from vtriune.messages import Canary, Group, PublishOrder, PublishReport, SampleRef
from vtriune.runtime import ActorError, this_host
from vtriune.weights.meeting import PublishFailure

AGREES = 1e-5
"""Nats, float32 against transformers."""
IMAGE_ROW, OTHER_IMAGE_ROW, TEXT_ROW = 0, 1, 3
START_S = 240.0


class Site(NamedTuple):
    """A generator's process, and the model it must agree with."""

    generator: Any
    model: Any
    preprocessor: Preprocessor
    sender: WeightSender
    keeper: Any

    async def sample(self, *args: Any, **kwargs: Any) -> Group:
        group: Group = await self.generator.sample.call_one(lease(*args, **kwargs))
        return group

    async def publish(self, version: int, *, full: bool = False, deadline_s: float = 20.0) -> PublishReport:
        order = PublishOrder(version, self.sender.open_rendezvous(2), full, deadline_s)
        sent, received = await asyncio.gather(
            asyncio.to_thread(self.sender.send, order, 0),
            _value(self.generator.receive.call_one(msgspec.structs.replace(order, member=1))),
        )
        assert (sent.checksum, sent.num_tensors, sent.num_bytes) == (
            received.checksum,
            received.num_tensors,
            received.num_bytes,
        )
        return received  # type: ignore[no-any-return]

    def errors(self, group: Group) -> list[float]:
        """Largest |ours − transformers'| of each trajectory."""
        sampling, row = group.lease.sampling, group.lease.sample.row
        return [
            float(
                np.abs(oracle(self.model, self.preprocessor, row, t.token_ids, sampling.temperature) - t.logprobs).max()
            )
            for t in group.trajectories
        ]


async def _value(future: Any) -> Any:
    return await future


def _trained(name: str) -> bool:
    return "visual" not in name


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    """Two generators, one of a model with tied embeddings; started side by side."""
    torch.set_num_threads(1)
    keepers = this_host().spawn_procs({"procs": 1}, name="keepers", on_failure=print)
    keeper = keepers.spawn("keeper", Keeper)
    procs, starting = [keepers], {}
    for name in ("untied", "tied"):
        folder = write_model(tmp_path_factory.mktemp(name), tied=name == "tied", seed=len(name))
        # The tied one has room for about 2,000 tokens: of 32 completions of 120 tokens some must give way.
        room = {
            "threads": 1,
            "max_sequences": 32,
            "max_model_len": 256,
            "kv_cache_gib": 0.004 if name == "tied" else 0.02,
        }
        config = settings(folder, cluster={"generators": room})
        mesh = this_host().spawn_procs({"procs": 1}, name=f"generator-{name}", on_failure=print)
        procs.append(mesh)
        pause_s = 0.004 if name == "untied" else 0.0
        starting[name] = (folder, config, mesh.spawn("generator", StagedGenerator, config, keeper, pause_s))
    ready = {name: actor.ready.within(START_S).call_one() for name, (_, _, actor) in starting.items()}
    made = {}
    for name, (folder, config, actor) in starting.items():
        ready[name].get(timeout=START_S)
        model = load_model(folder)
        made[name] = Site(actor, model, preprocessor_of(config), WeightSender(model, _trained), keeper)
    yield made
    for site in made.values():
        site.sender.close()
    for mesh in procs:
        mesh.stop().get(timeout=30)


@pytest.fixture
def site(sites: dict[str, Site]) -> Site:
    return sites["untied"]


def _perturb_trained(model: Any, seed: int) -> None:
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not _trained(name)}
    perturb(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in frozen:
                parameter.copy_(frozen[name])


@pytest.mark.parametrize("row", [IMAGE_ROW, OTHER_IMAGE_ROW, TEXT_ROW])
@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0, 0.0])
async def test_sampled_logprobs_are_transformers_of_the_distribution_sampled_from(
    site: Site, row: int, temperature: float
) -> None:
    group = await site.sample(1, row, 3, temperature=temperature)
    assert max(site.errors(group)) < AGREES
    assert [t.logprobs.dtype for t in group.trajectories] == [np.float32] * 3
    if temperature == 0:
        assert len({t.token_ids.tobytes() for t in group.trajectories}) == 1
        greedy = oracle_argmax(site, row, group.trajectories[0].token_ids)
        assert greedy.tolist() == group.trajectories[0].token_ids.tolist()


def oracle_argmax(site: Site, row: int, response: np.ndarray) -> np.ndarray:
    """transformers' most likely unmasked token at each place of `response`."""
    best = np.full(len(response), -np.inf)
    choice = np.zeros(len(response), np.int64)
    prompt = site.preprocessor.prepare(Rows().get(SampleRef("rows", row)))
    ids = torch.tensor([[*prompt.prompt_ids.tolist(), *response.tolist()]])
    extra: dict[str, Any] = {}
    if len(prompt.image_grid_thw):
        extra = {
            "pixel_values": torch.from_numpy(prompt.pixel_values),
            "image_grid_thw": torch.from_numpy(prompt.image_grid_thw),
            "mm_token_type_ids": (ids == site.preprocessor.image_token_id).int(),
        }
    with torch.no_grad():
        logits = site.model(input_ids=ids, **extra).logits[0, len(prompt.prompt_ids) - 1 : -1].numpy()
    for token in set(range(logits.shape[1])) - set(site.preprocessor.pad_token_ids):
        better = logits[:, token] > best
        best[better], choice[better] = logits[better, token], token
    return choice


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
async def test_a_distribution_cut_to_its_likeliest_token_is_sampled_as_greedily(
    site: Site, cut: dict[str, Any]
) -> None:
    whole = await site.sample(1, IMAGE_ROW, 3, temperature=1.0)
    greedy = await site.sample(1, IMAGE_ROW, 1, temperature=0.0)
    group = await site.sample(1, IMAGE_ROW, 3, temperature=1.0, **cut)
    (expected,) = {t.token_ids.tobytes() for t in greedy.trajectories}
    assert {t.token_ids.tobytes() for t in whole.trajectories} != {expected}
    assert {t.token_ids.tobytes() for t in group.trajectories} == {expected}
    # The log-probs are of what was sampled from: nothing else was left.
    assert all(np.abs(t.logprobs).max() < AGREES for t in group.trajectories)


async def test_image_and_video_pads_are_never_sampled_and_their_mass_is_spread_over_the_others(site: Site) -> None:
    pads = site.preprocessor.pad_token_ids
    head = site.model.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        # The pads' logits become the largest by far: without the mask nothing else would be sampled.
        head[pads] = 40 * head[[20, 21]]
    try:
        await site.publish(100)
        group = await site.sample(2, IMAGE_ROW, 4)
        assert not {int(token) for t in group.trajectories for token in t.token_ids} & set(pads)
        assert max(site.errors(group)) < AGREES
    finally:
        with torch.no_grad():
            head.copy_(before)
        await site.publish(101)


async def test_prompt_ids_come_back_as_the_engine_expanded_them(site: Site) -> None:
    group = await site.sample(3, IMAGE_ROW)
    prompt = site.preprocessor.prepare(Rows().get(SampleRef("rows", IMAGE_ROW)))
    assert group.prompt_ids.tolist() == prompt.prompt_ids.tolist()
    assert int((group.prompt_ids == site.preprocessor.image_token_id).sum()) > 1


async def test_seeded_completions_repeat_and_differ_from_each_other(site: Site) -> None:
    first, again = [await site.sample(4, IMAGE_ROW, 3, seed=7) for _ in range(2)]
    tokens = [[t.token_ids.tolist() for t in group.trajectories] for group in (first, again)]
    assert tokens[0] == tokens[1]
    assert len({tuple(ids) for ids in tokens[0]}) == 3


async def test_the_canary_is_scored_as_it_would_have_been_sampled(site: Site) -> None:
    group = await site.sample(5, IMAGE_ROW, 1)
    response = group.trajectories[0].token_ids
    scores = await site.generator.canary.call_one(Canary(SampleRef("rows", IMAGE_ROW), response))
    assert np.abs(np.asarray(scores) - group.trajectories[0].logprobs).max() < AGREES


async def test_a_canary_scored_beside_running_completions_leaves_their_logprobs_alone(site: Site) -> None:
    response = (await site.sample(5, IMAGE_ROW, 1)).trajectories[0].token_ids
    running = asyncio.ensure_future(site.sample(6, IMAGE_ROW, 8, max_tokens=120))
    await _until(site, "running", 8)
    scores = await site.generator.canary.call_one(Canary(SampleRef("rows", IMAGE_ROW), response))
    assert not running.done(), "nothing ran beside the canary"
    assert max(site.errors(await running)) < AGREES
    assert np.abs(np.asarray(scores) - oracle(site.model, site.preprocessor, IMAGE_ROW, response)).max() < AGREES


@pytest.mark.parametrize("kind", ["untied", "tied"])
async def test_after_every_publish_an_image_prompt_has_the_new_models_logprobs(
    sites: dict[str, Site], kind: str
) -> None:
    site = sites[kind]
    for version, full in ((200, True), (201, False), (202, False), (203, True)):
        before = await site.sample(6, IMAGE_ROW, 2)
        if full:
            perturb(site.model, version)
        else:
            _perturb_trained(site.model, version)
        report = await site.publish(version, full=full)
        assert report.num_tensors == sum(full or _trained(name) for name in site.model.state_dict())
        after = await site.sample(7, IMAGE_ROW, 2)
        assert max(site.errors(before)) > 100 * AGREES, "the update is too small to tell the models apart"
        assert max(site.errors(after)) < AGREES
        assert {span.version for t in after.trajectories for span in t.spans} == {version}


class Crossing(NamedTuple):
    """Groups that were running when the model changed from `old` to the site's."""

    old: Any
    groups: list[Group]
    version: int


async def _cross(site: Site, mode: str, version: int, row: int) -> Crossing:
    """Publish in the middle of six groups of 8 × 120 tokens, begun at once; 32 run, 16 wait."""
    config_old = load_state(site.model)
    await site.generator.set_in_flight.call_one(mode)
    await site.generator.hold.call_one()
    running = [asyncio.ensure_future(site.sample(10 + i, row, 8, max_tokens=120)) for i in range(6)]
    await _until(site, "waiting", 48)
    await site.generator.release.call_one()
    await asyncio.sleep(0.25)
    _perturb_trained(site.model, version)
    await site.publish(version)
    return Crossing(config_old, await asyncio.gather(*running), version)


async def _until(site: Site, state: Literal["running", "waiting"], num_completions: int) -> None:
    async with asyncio.timeout(20):
        while (await site.generator.stats.call_one())[state] < num_completions:
            await asyncio.sleep(0.01)


def load_state(model: Any) -> Any:
    """A copy of `model` as it is now."""
    import copy

    return copy.deepcopy(model)


def _spans_by_crossing(crossing: Crossing) -> list[list[tuple[int, int]]]:
    return [[(s.version, s.num_tokens) for s in t.spans] for group in crossing.groups for t in group.trajectories]


async def test_recompute_tokens_after_a_publish_have_the_new_models_logprobs_from_the_very_first(site: Site) -> None:
    crossing = await _cross(site, "recompute", 300, IMAGE_ROW)
    spans = _spans_by_crossing(crossing)
    assert any(len(of_one) == 2 for of_one in spans), "the publish met nothing running"
    assert any(of_one == [(300, 120)] for of_one in spans), "nothing waited"
    for group in crossing.groups:
        for trajectory in group.trajectories[:3]:
            num_old = sum(s.num_tokens for s in trajectory.spans if s.version != 300)
            old = oracle(crossing.old, site.preprocessor, IMAGE_ROW, trajectory.token_ids)
            new = oracle(site.model, site.preprocessor, IMAGE_ROW, trajectory.token_ids)
            assert np.abs(old[:num_old] - trajectory.logprobs[:num_old]).max(initial=0) < AGREES
            assert np.abs(new[num_old:] - trajectory.logprobs[num_old:]).max(initial=0) < AGREES


async def test_continue_keeps_running_keys_and_values_and_starts_waiting_ones_under_the_new_version(site: Site) -> None:
    crossing = await _cross(site, "continue", 301, TEXT_ROW)
    spans = _spans_by_crossing(crossing)
    assert any(len(of_one) == 2 for of_one in spans), "the publish met nothing running"
    for group in crossing.groups:
        for trajectory in group.trajectories[:3]:
            num_old = sum(s.num_tokens for s in trajectory.spans if s.version != 301)
            expected = _mixed(site, crossing.old, trajectory.token_ids, num_old)
            assert np.abs(expected - trajectory.logprobs).max() < AGREES


def _mixed(site: Site, old: Any, response: np.ndarray, num_old: int) -> np.ndarray:
    """Log-probs when keys and values up to the last old token are the old model's and all later ones the new model's."""
    prompt = site.preprocessor.prepare(Rows().get(SampleRef("rows", TEXT_ROW)))
    num_prompt = len(prompt.prompt_ids)
    ids = torch.tensor([[*prompt.prompt_ids.tolist(), *response.tolist()]])
    # The last old token enters the model, and the cache, in the first new step.
    cut = num_prompt + num_old - 1 if num_old else 0
    logits = []
    with torch.no_grad():
        cache = None
        if cut:
            first = old(input_ids=ids[:, :cut], use_cache=True)
            cache = first.past_key_values
            logits.append(first.logits[0])
        second = site.model(input_ids=ids[:, cut:], past_key_values=cache, position_ids=_positions(cut, ids.shape[1]))
        logits.append(second.logits[0])
    rows = torch.cat(logits)[num_prompt - 1 : -1].double()
    rows[:, site.preprocessor.pad_token_ids] = -torch.inf
    scores = torch.log_softmax(rows / TEMPERATURE, -1)
    return scores.gather(1, ids[0, num_prompt:, None])[:, 0].numpy()  # type: ignore[no-any-return]


def _positions(start: int, end: int) -> torch.Tensor:
    """M-RoPE positions of text: the same on all three axes."""
    return torch.arange(start, end).expand(3, 1, -1)


async def test_drain_lets_every_started_completion_end_under_the_version_it_began_with(site: Site) -> None:
    crossing = await _cross(site, "drain", 302, IMAGE_ROW)
    spans = _spans_by_crossing(crossing)
    assert {len(of_one) for of_one in spans} == {1}
    assert {of_one[0][0] for of_one in spans} == {301, 302}
    for group in crossing.groups:
        for trajectory in group.trajectories[:2]:
            model = site.model if trajectory.spans[0].version == 302 else crossing.old
            expected = oracle(model, site.preprocessor, IMAGE_ROW, trajectory.token_ids)
            assert np.abs(expected - trajectory.logprobs).max() < AGREES
    await site.generator.set_in_flight.call_one("continue")


async def test_a_scored_group_goes_to_a_verifier_and_its_report_comes_back(site: Site) -> None:
    report = await site.generator.generate.call_one(lease(77, IMAGE_ROW, 2), [])
    assert (report.group_id, report.num_tokens, report.rewards) == (77, 48, [1.0, 1.0])


async def test_a_group_shared_between_two_generators_is_the_one_that_one_would_have_sampled(site: Site) -> None:
    # The other one is the same again, by reference: its share goes over the wire and back.
    await site.keeper.take.call_one()
    await site.generator.generate.call_one(lease(78, IMAGE_ROW, 5, seed=11), [])
    await site.generator.generate.call_one(lease(79, IMAGE_ROW, 5, seed=11), [site.generator])
    alone, shared = await site.keeper.take.call_one()
    assert [t.token_ids.tolist() for t in alone.trajectories] == [t.token_ids.tolist() for t in shared.trajectories]
    assert max(site.errors(shared)) < AGREES
    assert shared.lease.num_completions == len(shared.trajectories) == 5


async def test_a_tensor_the_engine_does_not_know_is_refused_before_anything_is_sent(site: Site) -> None:
    class Misnamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

    before = await site.generator.stats.call_one()
    stranger = WeightSender(Misnamed(), lambda name: True)
    broken = site._replace(sender=stranger)
    with pytest.raises(
        (PublishFailure, ActorError), match=r"2 tensors the engine's model does not have: inner\.weight"
    ):
        await broken.publish(400, deadline_s=5.0)
    stranger.close()
    after = await site.sample(8, IMAGE_ROW, 2)
    assert max(site.errors(after)) < AGREES
    assert (await site.generator.stats.call_one())["version"] == before["version"]


async def test_half_a_module_is_refused(site: Site) -> None:
    partly = WeightSender(site.model, lambda name: name.endswith("layers.0.self_attn.q_proj.weight"))
    with pytest.raises((PublishFailure, ActorError), match="a module is loaded whole or not at all"):
        await site._replace(sender=partly).publish(401, deadline_s=5.0)
    partly.close()


async def test_a_sender_that_vanishes_half_way_leaves_the_engine_as_it_was_within_the_deadline(site: Site) -> None:
    version = (await site.generator.stats.call_one())["version"]
    start = time.monotonic()
    with pytest.raises(ActorError, match="phase transfer") as caught:
        await _vanish(site, 402)
    assert caught.value.kind == "bystander"
    assert time.monotonic() - start < 10
    group = await site.sample(9, IMAGE_ROW, 2)
    assert max(site.errors(group)) < AGREES
    assert (await site.generator.stats.call_one())["version"] == version
    perturb(site.model, 403)
    await site.publish(403, full=True)
    assert max(site.errors(await site.sample(9, IMAGE_ROW, 2))) < AGREES


async def _vanish(site: Site, version: int) -> None:
    """Agree, form the data group, then leave it without sending and without a word."""
    order = PublishOrder(version, site.sender.open_rendezvous(2), True, 6.0)
    receiving = asyncio.ensure_future(_value(site.generator.receive.call_one(msgspec.structs.replace(order, member=1))))

    class Leaves(WeightSender):
        def _send_bucket(self, *args: Any) -> None:
            assert self._group is not None
            self._group.close()
            raise KeyboardInterrupt

    leaver = Leaves(site.model, _trained)
    leaver._listening = site.sender._listening
    with contextlib.suppress(KeyboardInterrupt):
        await asyncio.to_thread(leaver.send, order, 0)
    await receiving


async def test_completions_that_gave_way_to_others_for_want_of_room_are_as_exact_as_any(sites: dict[str, Site]) -> None:
    site = sites["tied"]
    groups = await asyncio.gather(*(site.sample(40 + i, (0, 1, 2, 4)[i], 8, max_tokens=120) for i in range(4)))
    # Rounding grows with the length: these are five times as long as the others.
    assert max(max(site.errors(group)) for group in groups) < 3 * AGREES
    assert await site.generator.num_preemptions.call_one() > 0


async def test_a_request_the_engine_cannot_hold_is_refused_with_what_to_change(site: Site) -> None:
    with pytest.raises(ActorError, match=r"cluster\.generators\.max_model_len is 256"):
        await site.sample(11, IMAGE_ROW, max_tokens=400)


async def test_an_exception_in_the_engine_fails_every_waiting_lease_with_its_cause(sites: dict[str, Site]) -> None:
    site = sites["tied"]
    waiting = [asyncio.ensure_future(site.sample(20 + i, IMAGE_ROW, 8, max_tokens=150)) for i in range(8)]
    await _until(site, "running", 1)
    await site.generator.break_step.call_one()
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)
    broken = [result for result in results if isinstance(result, ActorError)]
    assert broken
    assert all("the engine has stopped: ZeroDivisionError: a kernel divided by zero" in str(error) for error in broken)
    with pytest.raises(ActorError, match="the engine has stopped"):
        await site.sample(30, IMAGE_ROW)
