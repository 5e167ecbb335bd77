"""What `genevolve-fast process train` can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.train.config import CheckpointConfig, OptimConfig
from genevolve_fast.trajectory import STAGES, StageName

Target = Literal["process", "one_pass", "plan", "inspect"]
KEPT: dict[Target, tuple[StageName, ...]] = {
    "process": STAGES,
    "one_pass": ("sketch",),
    "plan": ("plan", "sketch"),
    "inspect": ("sketch", "inspect", "refine"),
}  # stages that a row has under each target


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ModelConfig(_Section):
    path: str | None = Field(None, description="Folder of a unified model to go on from; none: random weights")
    hidden: int = Field(128, ge=32, multiple_of=32, description="Width of the decoder")
    layers: int = Field(4, ge=1, description="Layers of the decoder")
    heads: int = Field(4, ge=2, multiple_of=2, description="Attention heads of 32 numbers, two share keys and values")
    patch_size: int = Field(4, ge=1, description="Pixels of a latent patch's side: a picture of 32 has (32 / n)² rows")
    predicts: Literal["picture", "velocity"] = Field(
        "picture", description="What the flow head gives; the velocity follows from the picture, or is given itself"
    )

    @model_validator(mode="after")
    def _refuse(self) -> ModelConfig:
        if self.path is not None:
            plain = type(self).model_fields
            if changed := [n for n in plain if n != "path" and getattr(self, n) != plain[n].default]:
                raise ValueError(f"{', '.join(changed)} with a path would do nothing: the folder's model has its shape")
        return self


class FlowConfig(_Section):
    ce_weight: float = Field(0.25, ge=0, description="λ of L = λ · CE(text) + MSE(velocity)")
    copies: int = Field(4, ge=1, description="Noised copies of each draft in a step, each at a time of its own")
    times: Literal["uniform", "logistic_normal"] = Field(
        "uniform", description="Of the noised drafts; `logistic_normal` hardly trains the first steps out of noise"
    )
    shift: float = Field(1.0, gt=0, description="Above 1 moves the times of training and drawing towards noise")
    stages: list[StageName] = Field(
        list(STAGES), description="Stages whose texts are learnt; image markers and the end always are"
    )

    @model_validator(mode="after")
    def _refuse(self) -> FlowConfig:
        if len(set(self.stages)) != len(self.stages):
            raise ValueError(f"stages names one twice: {', '.join(self.stages)}")
        return self


class SamplesConfig(_Section):
    every: int = Field(200, ge=0, description="Steps from one drawing to the next, and after the last; 0: never")
    count: int = Field(4, ge=1, description="Requests of the rows, of as many categories as there are")
    requests: list[str] = Field([], description="Draw these instead")
    steps: int = Field(10, ge=1, description="Euler steps of a draft")

    @model_validator(mode="after")
    def _refuse(self) -> SamplesConfig:
        plain = type(self).model_fields
        changed = [n for n in ("count", "requests", "steps") if getattr(self, n) != plain[n].default]
        if changed and not self.every:
            raise ValueError(f"{', '.join(changed)} with every 0 would do nothing: nothing is drawn")
        if self.requests and "count" in changed:
            raise ValueError("count with requests would do nothing: all that are named are drawn")
        if not all(map(str.strip, self.requests)):
            raise ValueError("requests names an empty one")
        if len(set(self.requests)) != len(self.requests):
            raise ValueError("requests names one twice")
        return self


class UnifiedConfig(_Section):
    """`genevolve-fast process train`."""

    name: str = Field("process", description="Run folder under `runs/`")
    seed: int = Field(0, description="Seed of random weights, order of the rows, times and noise")
    data: str = Field("", description="Folder of process rows and their drafts")
    target: Target = Field(
        "process",
        description="`one_pass`: of each row only its request and its last draft. `plan`: plans and what each cycle "
        "ended with, nothing inspected. `inspect`: all drawn at once, inspected and mended, nothing planned",
    )
    steps: int = Field(2000, ge=1, description="Optimizer steps; rows repeat where there are fewer")
    batch_size: int = Field(32, ge=1, description="Rows of one optimizer step")
    max_tokens_per_microbatch: int = Field(
        8192, ge=1, description="Rows of the decoder, noised copies among them, in one forward and backward"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; none: torch's default")
    model: ModelConfig = Field(default_factory=ModelConfig)
    flow: FlowConfig = Field(default_factory=FlowConfig)
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=2e-3, weight_decay=0.01, warmup_ratio=0.03, schedule="cosine")
    )
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig(every=200, keep_last=1))
    samples: SamplesConfig = Field(default_factory=SamplesConfig)

    @model_validator(mode="after")
    def _refuse(self) -> UnifiedConfig:
        if self.optim.release_gradients:
            raise ValueError("optim.release_gradients is of sft: the layers here pass without checkpointing")
        if self.optim.bf16 != "nearest":
            raise ValueError(f"optim.bf16 {self.optim.bf16!r} would do nothing: the model trains in float32")
        if self.target == "one_pass" and set(self.flow.stages) != set(STAGES):
            raise ValueError("flow.stages with target 'one_pass' would do nothing: such rows hold no texts")
        if set(self.flow.stages) != set(STAGES) and (useless := set(self.flow.stages) - set(KEPT[self.target])):
            raise ValueError(f"flow.stages {', '.join(sorted(useless))} would do nothing with target {self.target!r}")
        return self
