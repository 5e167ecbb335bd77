"""From sampled rollouts to judged ones: what fails on the way costs no more than itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from genevolve_fast import trajectory as trajectories
from genevolve_fast.data.config import DataConfig, open_requests
from genevolve_fast.protocols import JudgeError
from genevolve_fast.sandbox.world import SandboxWorld, open_world
from genevolve_fast.train.collect import Rollouts, judge_rollouts
from genevolve_fast.train.config import EvolveConfig, parse_config
from genevolve_fast.train.evolve import collect, refuse_failed
from genevolve_fast.train.run import Run, RunError
from genevolve_fast.trajectory import Failed, Judged, Program, Trajectory, Turn

EMBEDDED = SandboxWorld()
REQUESTS = {r.id: r for r in EMBEDDED.requests("train", 2)}


def rollout(request_id: str, k: int, **changes) -> Trajectory:
    return Trajectory(
        id=f"{request_id}/{k}",
        request_id=request_id,
        group_id=request_id,
        ids=np.arange(3),
        loss_mask=np.array([False, False, True]),
        rollout_logps=np.zeros(3, np.float32),
        request_stop=1,
        turns=(Turn("user", 0, 2), Turn("assistant", 2, 3)),
        program=Program("Background white. A red circle at the center."),
        termination="answer",
    ).replace(**changes)


ROLLOUTS = Rollouts(tuple(rollout(id_, k) for id_ in REQUESTS for k in range(2)), {}, {})


class Counting:
    """A judge of the sandbox that counts its calls and fails while `down`."""

    def __init__(self, judge, down: bool = False) -> None:
        self.judge_, self.calls, self.down = judge, 0, down

    async def judge(self, *shown):
        self.calls += 1
        if self.down:
            raise JudgeError("the judge is gone", "connect")
        return await self.judge_.judge(*shown)


def world_with(**changes):
    return replace(open_world(EMBEDDED), **changes)


def test_a_broken_ground_truth_leaves_its_own_group_unjudged(tmp_path):
    """It is there, so the check at the start passes; a run of days must not end at it, nor at every --resume."""
    from PIL import Image

    broken, whole = REQUESTS.values()
    Image.fromarray(EMBEDDED.truth(whole)).save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    (tmp_path / "train.jsonl").write_text(
        f'{{"id": "{broken.id}", "question": "a", "gt_image": "broken.png"}}\n'
        f'{{"id": "{whole.id}", "question": "b", "gt_image": "whole.png"}}\n'
    )
    _, truth = open_requests(DataConfig(path=str(tmp_path / "train.jsonl")), "rl")
    named = {
        id_: replace(r, gt_image=name)
        for (id_, r), name in zip(REQUESTS.items(), ("broken.png", "whole.png"), strict=True)
    }
    world = world_with(truth=truth)
    judged = judge_rollouts(ROLLOUTS, named, world).trajectories
    outcomes = [type(t.outcome) for t in judged]
    assert outcomes == [Failed, Failed, Judged, Judged]
    assert judged[0].outcome.stage == "judge" and "broken.png" in judged[0].outcome.reason
    assert world.incidents.take() == {"judge/other": 2}


def test_the_ground_truth_of_a_group_is_read_once():
    read = []

    def truth(request):
        read.append(request.id)
        return EMBEDDED.truth(request)

    judge_rollouts(ROLLOUTS, REQUESTS, world_with(truth=truth))
    assert read == list(REQUESTS)


def test_what_is_judged_is_not_judged_again():
    image_judge = Counting(open_world(EMBEDDED).image_judge)
    done = Judged(reward=0.25, kscore=0.25, program=0.25)
    first, *others = ROLLOUTS.trajectories
    rollouts = Rollouts((first.replace(outcome=done), *others), {}, {})
    judged = judge_rollouts(rollouts, REQUESTS, world_with(image_judge=image_judge)).trajectories
    assert [t.id for t in judged] == [t.id for t in rollouts.trajectories]
    assert judged[0].outcome == done and image_judge.calls == 3


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path, parse_config(EvolveConfig, {}), device=torch.device("cpu"), total=1, resume=False)
    made.begin(0)
    yield made
    made.close()


def collected(run, world):
    config = parse_config(EvolveConfig, {"max_failed_share": 0.5})
    file = run.folder / "rollouts" / "step_000000.safetensors"
    rollouts = collect(file, config, None, world, None, REQUESTS, 0, None, run.phase)  # there is no engine to sample
    refuse_failed(rollouts, file, config, 0)
    return rollouts


def test_a_part_of_a_step_may_fail_whole_where_the_others_have_not(run):
    """Each rank collects its own requests; the share that may fail is of all ranks'."""
    config, file = parse_config(EvolveConfig, {"max_failed_share": 0.5}), run.folder / "rollouts" / "part.safetensors"
    trajectories.save(file, ROLLOUTS.trajectories)
    gone = world_with(image_judge=Counting(open_world(EMBEDDED).image_judge, down=True))
    part = collect(file, config, None, gone, None, REQUESTS, 0, None, run.phase).trajectories
    good = tuple(t.replace(outcome=Judged(reward=0.25, kscore=0.25, program=0.25)) for t in part)
    assert all(isinstance(t.outcome, Failed) for t in part)
    refuse_failed(Rollouts((*part, *good), {}, {}), file, config, 0)
    with pytest.raises(RunError, match="5 of 8 rollouts failed"):
        refuse_failed(Rollouts((*part, part[0], *good[1:]), {}, {}), file, config, 0)


def test_a_judge_that_is_gone_for_good_costs_no_sampled_rollout(run):
    """The run ends, and goes on from the rollouts that it has sampled: only the scores are asked for again."""
    path = run.folder / "rollouts" / "step_000000.safetensors"
    trajectories.save(path, ROLLOUTS.trajectories)
    gone = Counting(open_world(EMBEDDED).image_judge, down=True)
    with pytest.raises(RunError, match="4 of 4 rollouts failed.*the judge is gone.*--resume"):
        collected(run, world_with(image_judge=gone))
    assert [t.outcome for t in trajectories.load(path)[0]] == [None] * 4
    gone.down = False
    again = collected(run, world_with(image_judge=gone))
    assert [type(t.outcome) for t in again.trajectories] == [Judged] * 4
    assert [t.outcome for t in trajectories.load(path)[0]] == [t.outcome for t in again.trajectories]


def test_rollouts_that_the_engine_lost_are_sampled_again(run):
    path = run.folder / "rollouts" / "step_000000.safetensors"
    lost = Failed("engine", "no server", "connect")
    first, *others = ROLLOUTS.trajectories
    trajectories.save(path, [first, *(t.replace(outcome=lost) for t in others)])
    with pytest.raises(RunError, match="3 of 4 rollouts failed"):
        collected(run, open_world(EMBEDDED))
    assert not path.exists()
