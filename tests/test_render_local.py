"""Local diffusers pipelines: tiny random ones, loaded from the published layout and really run."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from genevolve_fast.protocols import RenderError
from genevolve_fast.render.job import Job, Offer
from genevolve_fast.render.local import DiffusersPipeline, LocalRenderer, PipelineSettings
from genevolve_fast.trajectory import Program, Reference
from tests.tiny_pipelines import save_tiny_edit, save_tiny_flux

pytestmark = pytest.mark.slow  # server processes, or pipelines of diffusers

SMALL = {"dtype": "float32", "device": "cpu", "num_inference_steps": 2, "long_side": 64}
CLOSE = 2 / 255  # what batching may change


@pytest.fixture(scope="module")
def edit_folder(tmp_path_factory):
    return str(save_tiny_edit(tmp_path_factory.mktemp("edit")))


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    return str(save_tiny_flux(tmp_path_factory.mktemp("flux")))


@pytest.fixture(autouse=True)
def small_references(monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    monkeypatch.setattr(module, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(module, "CONDITION_IMAGE_SIZE", 56 * 56)


@pytest.fixture(scope="module")
def edit_pipeline(edit_folder):
    return DiffusersPipeline(PipelineSettings(model=edit_folder, **SMALL))


@pytest.fixture(scope="module")
def flux_pipeline(flux_folder):
    return DiffusersPipeline(PipelineSettings("text-to-image", model=flux_folder, **SMALL))


def program(prompt: str, references: int) -> Program:
    return Program(prompt, tuple(Reference(f"IMG_{i + 1:03}") for i in range(references)))


def pixels(seed: int, height: int = 80, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def differing(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).max()) / 255


# --- settings ---------------------------------------------------------------------------------------------------------


def test_a_picture_has_the_first_reference_s_aspect_and_the_released_size():
    settings = PipelineSettings()
    assert settings.size([pixels(0, 480, 640), pixels(1, 500, 100)]) == (1024, 768)
    assert settings.size([pixels(0, 1000, 301)]) == (304, 1024)
    assert settings.size([pixels(0, 10, 990)]) == (1024, 16)
    assert settings.size([]) == (1024, 1024)


def test_settings_of_none_become_the_kind_s_own():
    edit, text = PipelineSettings(), PipelineSettings("text-to-image")
    assert (edit.model, edit.num_inference_steps, edit.true_cfg_scale, edit.guidance_scale) == (
        "Qwen/Qwen-Image-Edit-2511",
        40,
        4.0,
        1.0,
    )
    assert (text.true_cfg_scale, text.guidance_scale, text.max_references) == (1.0, 3.5, 0)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        ({"kind": "gan"}, "none of qwen-image-edit"),
        ({"dtype": "int8"}, "none of bfloat16"),
        ({"device": "cuda:zero"}, "is no device"),
        ({"size_multiple": 8}, "no multiple of 16"),
        ({"long_side": 8}, "below size_multiple"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"kind": "text-to-image", "max_references": 1}, "from text alone"),
        ({"max_references": 0}, "needs at least one"),
        ({"true_cfg_scale": 1.0, "negative_prompt": "blurry"}, "does nothing"),
        ({"true_cfg_scale": float("nan")}, "no scale"),
        ({"offload": "disk"}, "none of none"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, reason):
    with pytest.raises(ValueError, match=reason):
        PipelineSettings(**wrong)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_references_prompt_and_seed_make_the_picture(edit_folder):
    renderer = LocalRenderer(PipelineSettings(model=edit_folder, **SMALL))
    assert (renderer.name, renderer.min_references, renderer.max_references) == ("qwen-image-edit", 1, 4)

    async def draw_all():
        two = [pixels(1), pixels(2)]
        return await asyncio.gather(
            renderer.render(program("a red fox", 2), two, 7),
            renderer.render(program("a red fox", 2), two, 7),
            renderer.render(program("a red fox", 2), two, 8),
            renderer.render(program("twenty green bottles on a wall", 2), two, 7),
            renderer.render(program("a red fox", 2), two[::-1], 7),
        )

    first, again, other_seed, other_prompt, other_order = asyncio.run(draw_all())
    assert first.shape == (64, 48, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert first.std() > 1
    for other in (other_seed, other_prompt, other_order):
        assert not np.array_equal(first, other)
    renderer.close()


def test_a_picture_equals_the_one_of_diffusers_own_call(edit_pipeline):
    import torch
    from PIL import Image

    references = (pixels(1), pixels(2))
    (ours,) = edit_pipeline.draw([Job("a red fox", references, 3, 48, 64)])
    theirs = edit_pipeline._pipe(
        image=[Image.fromarray(r) for r in references],
        prompt="a red fox",
        negative_prompt=" ",
        true_cfg_scale=4.0,
        num_inference_steps=2,
        width=48,
        height=64,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    assert np.array_equal(ours, np.asarray(theirs))


def test_text_alone_is_drawn_by_a_text_to_image_pipeline(flux_folder):
    renderer = LocalRenderer(PipelineSettings("text-to-image", model=flux_folder, **SMALL))

    async def draw_all():
        return await asyncio.gather(
            *(renderer.render(program(p, 0), [], s) for p, s in (("a", 1), ("a", 1), ("b c", 1)))
        )

    one, same, other = asyncio.run(draw_all())
    assert one.shape == (64, 64, 3) and np.array_equal(one, same) and not np.array_equal(one, other)
    renderer.close()


def test_an_edit_renderer_refuses_text_alone_and_says_what_draws_it(edit_folder, flux_folder):
    edit = LocalRenderer(PipelineSettings(model=edit_folder, **SMALL))
    text = LocalRenderer(PipelineSettings("text-to-image", model=flux_folder, **SMALL))
    with pytest.raises(RenderError, match="text-to-image") as refused:
        asyncio.run(edit.render(program("a", 0), [], 1))
    assert refused.value.kind == "bad_arguments"
    with pytest.raises(RenderError, match="qwen-image-edit"):
        asyncio.run(text.render(program("a", 1), [pixels(0)], 1))
    with pytest.raises(RenderError, match="2 references in the program, 1 given"):
        asyncio.run(edit.render(program("a", 2), [pixels(0)], 1))
    with pytest.raises(RenderError, match="at most 4"):
        asyncio.run(edit.render(program("a", 5), [pixels(i) for i in range(5)], 1))


# --- together ---------------------------------------------------------------------------------------------------------


def test_seeds_of_one_program_drawn_together_equal_those_drawn_alone_up_to_rounding(edit_pipeline):
    jobs = [Job("a red fox", (pixels(1),), seed, 48, 64) for seed in range(3)]
    alone = [edit_pipeline.draw([job])[0] for job in jobs]
    together = edit_pipeline.draw(jobs)
    assert all(differing(a, b) <= CLOSE for a, b in zip(alone, together, strict=True))
    assert differing(alone[0], alone[1]) > 10 * CLOSE  # so that a mix-up would show


def test_prompts_drawn_together_equal_those_drawn_alone_up_to_rounding(flux_pipeline):
    jobs = [Job(p, seed=s, width=64, height=64) for s, p in enumerate(("a red fox", "the sea at night", "x"))]
    alone = [flux_pipeline.draw([job])[0] for job in jobs]
    together = flux_pipeline.draw(jobs)
    assert all(differing(a, b) <= CLOSE for a, b in zip(alone, together, strict=True))
    assert differing(alone[0], alone[1]) > 10 * CLOSE


def test_what_cannot_be_drawn_together_is_refused(edit_pipeline):
    jobs = [Job("a red fox", (pixels(1),), 0, 48, 64), Job("a blue fox", (pixels(1),), 0, 48, 64)]
    with pytest.raises(RenderError, match="together"):
        edit_pipeline.draw(jobs)


def test_keys_tell_what_goes_together():
    seeds, prompts = Offer("m", 1, 4, together="seeds"), Offer("m", 0, 0, together="prompts")
    job = Job("p", (pixels(1),), 0, 64, 64)
    assert seeds.key(job) == seeds.key(Job("p", (pixels(1).copy(),), 5, 64, 64))
    for other in (
        Job("q", (pixels(1),), 0, 64, 64),
        Job("p", (pixels(2),), 0, 64, 64),
        Job("p", (pixels(1),), 0, 64, 80),
        Job("p", (pixels(1),), 0, 64, 64, num_inference_steps=3),
        Job("p", (pixels(1),), 0, 64, 64, negative_prompt="blurry"),
    ):
        assert seeds.key(job) != seeds.key(other)
    assert prompts.key(Job("p")) == prompts.key(Job("q", seed=4)) and prompts.key(job) is None
    assert Offer("m", 0, 0).key(Job("p")) is None


def test_a_renderer_batches_only_when_asked(edit_folder):
    def calls(max_batch: int) -> list[int]:
        renderer = LocalRenderer(PipelineSettings(model=edit_folder, **SMALL), max_batch)
        seen, draw = [], renderer.pipeline.draw
        renderer.pipeline.draw = lambda jobs: seen.append(len(jobs)) or draw(jobs)

        async def draw_all():
            await asyncio.gather(*(renderer.render(program("a", 1), [pixels(0)], s) for s in range(4)))

        asyncio.run(draw_all())
        renderer.close()
        return seen

    assert calls(1) == [1, 1, 1, 1]
    assert sum(calls(4)) == 4 and max(calls(4)) > 1


# --- failures ---------------------------------------------------------------------------------------------------------


def test_what_a_model_cannot_use_is_refused(edit_pipeline, flux_pipeline):
    with pytest.raises(RenderError, match="takes no guidance_scale"):
        edit_pipeline.draw([Job("a", (pixels(0),), guidance_scale=3.0)])
    with pytest.raises(RenderError, match="does nothing"):
        edit_pipeline.draw([Job("a", (pixels(0),), true_cfg_scale=1.0, negative_prompt="blurry")])
    with pytest.raises(RenderError, match="no multiple of 16"):
        edit_pipeline.draw([Job("a", (pixels(0),), width=50, height=64)])
    near, far = (
        flux_pipeline.draw([Job("a", width=64, height=64)]),
        flux_pipeline.draw([Job("a", width=64, height=64, true_cfg_scale=4.0, negative_prompt="blurry")]),
    )
    assert not np.array_equal(near[0], far[0])


def test_models_that_do_not_load_are_typed_failures(tmp_path, edit_folder, flux_folder):
    def failure(**settings) -> RenderError:
        with pytest.raises(RenderError) as failed:
            DiffusersPipeline(PipelineSettings(**{**SMALL, **settings})).load()
        return failed.value

    assert "use kind text-to-image" in str(failure(model=flux_folder))
    assert "use kind qwen-image-edit" in str(failure(kind="text-to-image", model=edit_folder))
    assert failure(model=flux_folder).kind == "bad_arguments"
    assert "cannot be loaded" in str(failure(model=str(tmp_path)))
    assert "needs a GPU" in str(failure(model=edit_folder, offload="model"))
    assert "torch sees" in str(failure(model=edit_folder, device="cuda:63"))


def test_a_model_that_did_not_load_is_not_loaded_for_every_picture(tmp_path, monkeypatch):
    pipeline = DiffusersPipeline(PipelineSettings(model=str(tmp_path), **SMALL))
    tries, opened = [], pipeline._opened
    monkeypatch.setattr(pipeline, "_opened", lambda: tries.append(1) or opened())
    for _ in range(2):
        with pytest.raises(RenderError, match="cannot be loaded"):
            pipeline.draw([Job("a", (pixels(0),), width=64, height=64)])
    assert len(tries) == 1


def test_numbers_that_are_no_colours_are_a_failure_and_no_picture(edit_folder):
    import torch

    pipeline = DiffusersPipeline(PipelineSettings(model=edit_folder, **SMALL))
    pipeline.load()
    with torch.no_grad():
        next(pipeline._pipe.transformer.parameters()).fill_(float("nan"))
    with pytest.raises(RenderError, match="NaN") as failed:
        pipeline.draw([Job("a", (pixels(0),), width=64, height=64)])
    assert failed.value.kind == "bad_response"


def test_a_lost_device_and_full_memory_are_told_apart(edit_folder):
    import torch

    from genevolve_fast.render.job import DeviceLostError

    pipeline = DiffusersPipeline(PipelineSettings(model=edit_folder, **SMALL))
    pipeline.load()

    def draw_with(error: Exception) -> RenderError:
        def fail(*_: object) -> None:
            raise error

        hook = pipeline._pipe.transformer.register_forward_pre_hook(fail)
        with pytest.raises(RenderError) as failed:
            pipeline.draw([Job("a", (pixels(0),), width=64, height=64)])
        hook.remove()
        return failed.value

    lost = draw_with(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert isinstance(lost, DeviceLostError)
    full = draw_with(torch.OutOfMemoryError("CUDA out of memory"))
    assert full.kind == "too_large" and not isinstance(full, DeviceLostError)
    assert pipeline.draw([Job("a", (pixels(0),), width=64, height=64)])[0].shape == (64, 64, 3)


def test_a_caller_that_gives_up_takes_no_company_with_it(edit_folder):
    """One that was cancelled while it waited must not be answered: the others of its call would never be."""
    renderer = LocalRenderer(PipelineSettings(model=edit_folder, **SMALL), max_batch=3)
    renderer.pipeline.load()

    async def give_up():
        first = asyncio.ensure_future(renderer.render(program("first", 1), [pixels(1)], 0))  # holds the thread
        await asyncio.sleep(0)
        calls = [asyncio.ensure_future(renderer.render(program("a", 1), [pixels(0)], s)) for s in range(3)]
        await asyncio.sleep(0)
        calls[0].cancel()
        return await asyncio.wait_for(asyncio.gather(first, *calls[1:]), 60)

    assert len(asyncio.run(give_up())) == 3
    renderer.close()


def test_a_caller_that_gives_up_is_not_drawn_for(edit_folder):
    renderer = LocalRenderer(PipelineSettings(model=edit_folder, **SMALL))
    drawn, draw = [], renderer.pipeline.draw
    renderer.pipeline.draw = lambda jobs: drawn.extend(j.seed for j in jobs) or draw(jobs)

    async def give_up():
        calls = [asyncio.ensure_future(renderer.render(program("a", 1), [pixels(0)], s)) for s in range(3)]
        await asyncio.sleep(0)
        calls[2].cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(give_up())
    renderer.close()
    assert drawn == [0, 1]
    with pytest.raises(RenderError, match="closed"):
        asyncio.run(renderer.render(program("a", 1), [pixels(0)], 0))
