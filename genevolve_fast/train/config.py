"""Typed YAML configuration: every field documented, wrong or ineffective combinations refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from genevolve_fast.agent.tools import ToolsConfig
from genevolve_fast.data.config import DataConfig
from genevolve_fast.experience.config import EmbedderConfig, SummarizerConfig
from genevolve_fast.fields import FieldError, set_fields, wrong_fields
from genevolve_fast.ops.objective import Objective
from genevolve_fast.policy.visits import TILE_ROWS
from genevolve_fast.render.config import RendererConfig
from genevolve_fast.reward.config import JudgeConfig

C = TypeVar("C", bound=BaseModel)


class ConfigError(ValueError):
    """The configuration cannot work; the message names the field and says why."""


class _Section(BaseModel):
    model_config = ConfigDict(  # inputs may hold keys
        extra="forbid", frozen=True, arbitrary_types_allowed=True, hide_input_in_errors=True
    )


class LoraConfig(_Section):
    rank: int = Field(0, ge=0, description="Rank of the trained adapter, the base stays frozen; 0: all weights train")
    alpha: float | None = Field(None, gt=0, description="The adapter's product is scaled by alpha / rank; none: 2·rank")
    targets: list[str] | Literal["all"] = Field("all", description="Names of the decoder's linear layers to adapt")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter; sft only")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank)")

    @model_validator(mode="after")
    def _refuse(self) -> LoraConfig:
        if self.rank == 0:
            plain = type(self).model_fields
            if changed := [n for n in plain if n != "rank" and getattr(self, n) != plain[n].default]:
                raise ValueError(f"{', '.join(changed)} without a rank would do nothing: set rank above 0")
        if self.targets == []:
            raise ValueError("targets is empty: name linear layers, or 'all'")
        return self


class PolicyConfig(_Section):
    path: str = Field("sandbox:start", description="Folder or hub name; `sandbox:start` ships, `sandbox:new` is random")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Weights and activations")
    freeze_vision: bool = Field(True, description="Vision tower and projector get no gradient")
    freeze_head: bool = Field(False, description="The LM head, and an embedding tied to it, get no gradient")
    gradient_checkpointing: bool = Field(False, description="Recompute layers in backward to save activation memory")
    tile_tokens: int = Field(TILE_ROWS, ge=1, description="Rows of a layer's MLP and projections in memory at once")
    offload_gib: float = Field(0.0, ge=0, description="Pinned host memory for layer inputs, in GiB")
    liger: bool = Field(False, description="RMSNorm and SwiGLU by liger-kernel, on a GPU")
    quantize: Literal["none", "nf4"] = Field(
        "none", description="Keep the decoder's matrices under an adapter in 4 bits (QLoRA), by bitsandbytes"
    )
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Train an adapter instead of the weights")

    @model_validator(mode="after")
    def _refuse(self) -> PolicyConfig:
        if self.quantize != "none" and not self.lora.rank:
            raise ValueError(
                f"quantize {self.quantize!r} needs lora.rank > 0: 4-bit weights cannot train, an adapter on them can"
            )
        if not self.gradient_checkpointing and (self.offload_gib or self.tile_tokens != TILE_ROWS):
            raise ValueError(
                "offload_gib and tile_tokens need gradient_checkpointing: without it a layer keeps everything"
            )
        if self.lora.rank and self.freeze_head:
            raise ValueError("freeze_head with lora.rank > 0 would do nothing: LoRA freezes all but itself")
        if self.lora.rank and not self.freeze_vision:
            raise ValueError(
                "freeze_vision false with lora.rank > 0 trains no vision tower: LoRA freezes all but itself"
            )
        return self


Category = Literal["emblem_field", "count_row", "emblem_motto", "text_sign", "relation"]
SEARCHED = ("emblem_field", "emblem_motto")  # what they ask for stands in no request


class WorldConfig(_Section):
    kind: Literal["sandbox"] = Field("sandbox", description="Where the agent acts: the embedded offline world")
    seed: int = Field(0, description="Seed of entities, facts and requests")
    categories: list[Category] = Field(
        default_factory=list, description="Templates of the sandbox's requests, emblem_field for one; none: all of them"
    )
    system_prompt: Literal["short", "full"] = Field(
        "short", description="`full`: the whole released protocol; `short`: what the sandbox's policy was trained with"
    )


class ServerConfig(_Section):
    urls: list[str] = Field(
        default_factory=list,
        description="Addresses of servers that run already, http://host:port; none: the run starts its own",
    )
    cpu_servers: int = Field(0, ge=0, description="Servers that the run starts on this machine's CPU")
    tensor_parallel_size: int = Field(1, ge=1, description="Of rollout_gpus, how many share one started server")
    backend: Literal["auto", "vllm", "transformers"] = Field(
        "auto", description="What the run starts on rollout_gpus: vLLM where it is installed, else our own"
    )
    gpu_memory_utilization: float | None = Field(
        None, gt=0, lt=1, description="Share of a GPU that a started vLLM takes; none: 0.85"
    )
    flags: list[str] = Field(default_factory=list, description="Passed to started servers as they are")
    start_timeout_s: float = Field(900.0, gt=0, description="Seconds until every started server must answer")
    sync: Literal["disk", "nccl"] = Field(
        "disk", description="New weights by safetensors in sync_dir, or broadcast between GPUs by vLLM's own transfer"
    )
    sync_dir: str | None = Field(
        None, description="Folder that trainer and servers see under the same path; none: in the run"
    )
    merge_lora: bool = Field(False, description="Send the adapter merged into whole weights instead of alone")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype of the servers' weights; none: policy.dtype"
    )
    patience_s: float = Field(600.0, gt=0, description="Seconds that a failing call is repeated for")
    timeout_s: float = Field(600.0, gt=0, description="Seconds one attempt may take")
    verify_every: int = Field(1, ge=0, description="Compare all parameters after every n-th update; 0: never")
    api_key_env: str | None = Field(None, description="Environment variable that holds the servers' key")

    @model_validator(mode="after")
    def _refuse(self) -> ServerConfig:
        for i, url in enumerate(self.urls):
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"urls.{i} does not begin with http:// or https://")
            if urlsplit(url).username is not None:
                raise ValueError(f"urls.{i} holds a user name or password: name their variable in api_key_env instead")
        if self.urls and self.sync == "disk" and not self.sync_dir:
            raise ValueError("sync 'disk' needs sync_dir: a folder that trainer and servers see under the same path")
        if self.sync == "nccl" and self.sync_dir:
            raise ValueError("sync_dir with sync 'nccl' would do nothing: weights are broadcast")
        if self.urls and self.cpu_servers:
            raise ValueError("urls and cpu_servers: servers run already, or the run starts them")
        if self.cpu_servers and self.sync == "nccl":
            raise ValueError("sync 'nccl' broadcasts between GPUs, and cpu_servers have none: use 'disk'")
        started = ("tensor_parallel_size", "backend", "gpu_memory_utilization", "flags", "start_timeout_s")
        changed = [name for name in started if getattr(self, name) != _plain(type(self), name)]
        if self.urls and changed:
            raise ValueError(f"{', '.join(changed)} with urls would do nothing: these servers run already")
        on_gpus = [name for name in changed if name in started[:3]]
        if self.cpu_servers and on_gpus:
            raise ValueError(f"{', '.join(on_gpus)} with cpu_servers would do nothing: each is our own, on the CPU")
        return self


class VllmConfig(_Section):
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the engine's weights")
    gpu_memory_utilization: float = Field(0.45, gt=0, lt=1, description="Share of the GPU for weights and KV")
    max_model_len: int | None = Field(
        None, ge=1, description="Tokens of prompt and replies; none: the rollout's limits"
    )
    max_num_seqs: int = Field(64, ge=1, description="Turns sampled together")
    enforce_eager: bool = Field(False, description="No CUDA graphs: slower, starts faster, less memory")
    merge_lora: bool = Field(False, description="Load the adapter merged into whole weights instead of alone")
    verify_every: int = Field(1, ge=0, description="Compare all parameters after every n-th update; 0: never")
    bucket_mb: int = Field(512, ge=1, description="Weights copied at once in an update, MiB")


class RolloutConfig(_Section):
    engine: Literal["transformers", "vllm", "server"] = Field(
        "transformers", description="Who samples: the policy itself, a vLLM on the same GPU, or servers"
    )
    server: ServerConfig = Field(default_factory=ServerConfig, description="For engine server")
    vllm: VllmConfig = Field(default_factory=VllmConfig, description="For engine vllm")
    staleness: Literal[0, 1] = Field(
        0, description="Updates that a rollout's weights may lag; 1: servers sample the next step while this one trains"
    )
    prompts_per_step: int = Field(8, ge=1, description="Requests sampled in one step")
    num_generations: int = Field(6, ge=1, description="Rollouts of each request: the group of GRPO")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature; the trainer's log-probs use it too")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus kept when sampling")
    replay_sampling_mask: bool = Field(
        False, description="Restrict the trainer's log-probs to the ids that top-p kept when sampling"
    )
    max_tokens_per_turn: int = Field(4096, ge=1, description="Tokens of one reply before it counts as too long")
    max_prompt_length: int = Field(6144, ge=1, description="Tokens of system prompt and request")
    max_response_length: int = Field(30000, ge=1, description="Tokens after the request, observations included")
    max_tool_calls: int = Field(10, ge=0, description="Tool calls of one rollout")
    max_rounds: int = Field(11, ge=1, description="Model calls of one rollout; the last one must answer")
    observe_images: Literal["tokens", "text"] = Field("tokens", description="How retrieved images are shown")
    tool_timeout_s: float = Field(60.0, gt=0, description="Seconds one tool call may take")
    max_batch: int = Field(64, ge=1, description="Turns the embedded engine samples together")
    deterministic: bool = Field(
        True, description="Embedded engine: batches by request id, not by which tool answers first"
    )

    @model_validator(mode="after")
    def _refuse_engine(self) -> RolloutConfig:
        read_by = {"server": "server", "vllm": "vllm", "max_batch": "transformers"}
        for name, engine in read_by.items():
            if engine != self.engine and getattr(self, name) != _plain(type(self), name):
                raise ValueError(f"{name} belongs to engine {engine!r}: engine {self.engine!r} does not read it")
        if self.staleness and self.engine != "server":
            why = "one set of weights trains and samples" if self.engine == "transformers" else "vLLM sleeps meanwhile"
            raise ValueError(f"staleness 1 cannot work with engine {self.engine!r}: {why}; it needs engine 'server'")
        longest = self.max_prompt_length + self.max_response_length
        if self.vllm.max_model_len and self.vllm.max_model_len < longest:
            raise ValueError(
                f"vllm.max_model_len {self.vllm.max_model_len} does not hold a rollout of max_prompt_length + "
                f"max_response_length = {longest} tokens: raise it, or lower those"
            )
        return self


class ProcessConfig(_Section):
    enabled: bool = Field(
        False, description="Rollouts are pictures that the policy grows in cycles: no tools, a draft after every plan"
    )
    prompts: Literal["scene", "edit"] = Field(
        "scene", description="scene: a draft is drawn from the whole description; edit: from the change to the last one"
    )
    max_cycles: int = Field(5, ge=1, le=5, description="Cycles of plan, sketch, inspect and refine")
    max_renders: int | None = Field(None, ge=1, description="Drafts of one rollout; none: 2 a cycle")
    attempts: int = Field(3, ge=1, description="Times a stage is asked for until its text can be read")
    score_drafts: bool = Field(True, description="The image judge scores every draft, so that stages can be compared")

    @model_validator(mode="after")
    def _refuse(self) -> ProcessConfig:
        changed = [n for n in type(self).model_fields if getattr(self, n) != _plain(type(self), n)]
        if changed and not self.enabled:
            raise ValueError(f"{', '.join(changed)} without enabled would do nothing")
        if self.max_renders is not None and self.max_renders >= 2 * self.max_cycles:
            raise ValueError(f"max_renders {self.max_renders} would do nothing: {self.max_cycles} cycles draw no more")
        return self


class ExperienceConfig(_Section):
    enabled: bool = Field(True, description="Compare best and worst and show the difference to the teacher")
    source: Literal["own", "shuffled"] = Field("own", description="`shuffled` gives each request another's experience")
    min_gap: float = Field(0.2, ge=0, description="Reward gap between best and worst worth a comparison")
    capacity: int = Field(500, ge=1, description="Bundles kept in memory")
    similarity: float = Field(0.84, ge=-1, le=1, description="Cosine a remembered bundle needs to be retrieved")
    max_comparisons: int = Field(8, ge=1, description="Comparisons per step")


class OptimConfig(_Section):
    name: Literal["adamw", "muon"] = Field("adamw", description="`muon`: layer matrices by Muon, the rest by AdamW")
    implementation: Literal["fused", "8bit", "paged_8bit", "cpu"] = Field(
        "fused",
        description="AdamW of torch; of bitsandbytes, moments in 8 bits, `paged`: they leave a full GPU; `cpu`: fp32 "
        "weights and moments in host memory, by DeepSpeed",
    )
    bf16: Literal["nearest", "stochastic", "master"] = Field(
        "nearest",
        description="bf16 weights after an update: rounded to nearest (small updates are lost), at random in "
        "proportion, or from fp32 copies",
    )
    lr: float = Field(1e-6, gt=0, description="Peak learning rate")
    weight_decay: float = Field(1e-6, ge=0, description="Decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW moments")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="Share of the steps spent warming up linearly")
    schedule: Literal["constant", "cosine"] = Field("constant", description="After the warm-up")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Gradient clipping by the global norm; none: off")
    release_gradients: bool = Field(
        False, description="Update a layer as soon as its backward is done and drop its gradient; sft of single samples"
    )
    skip_nonfinite: int = Field(
        0, ge=0, description="Steps in a row that may be passed over because loss or gradient is not finite"
    )

    @model_validator(mode="after")
    def _refuse(self) -> OptimConfig:
        if self.bf16 == "stochastic" and (self.name == "muon" or self.implementation in ("paged_8bit", "cpu")):
            raise ValueError(
                "bf16 'stochastic' is torchao's AdamW: it needs name adamw and implementation fused or 8bit"
            )
        if self.implementation == "cpu" and self.name == "muon":
            raise ValueError("implementation 'cpu' is AdamW by DeepSpeed on the host: it needs name adamw")
        return self


class DistributedConfig(_Section):
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "ddp", description="What several ranks share: nothing, optimizer state, also gradients, also weights (two ways)"
    )
    offload_optimizer: bool = Field(False, description="Optimizer state in host memory; zero1 to zero3")
    offload_params: bool = Field(False, description="Weights in host memory between visits; zero3, fsdp2 with state")
    timeout_s: float = Field(1800.0, gt=0, description="Seconds that a rank waits for the others before it gives up")

    @model_validator(mode="after")
    def _refuse(self) -> DistributedConfig:
        if self.offload_optimizer and not self.strategy.startswith("zero"):
            raise ValueError(
                f"offload_optimizer with strategy {self.strategy!r}: DeepSpeed offloads it, set zero1, zero2 or zero3 "
                "(fsdp2 moves it together with the weights: offload_params)"
            )
        if self.offload_params and self.strategy not in ("zero3", "fsdp2"):
            raise ValueError(f"offload_params with strategy {self.strategy!r} does nothing: set zero3 or fsdp2")
        return self

    @property
    def shards(self) -> bool:
        """Whether ranks share anything, and so visit layers in step."""
        return self.strategy != "ddp"


def refuse_shards(d: DistributedConfig, policy: PolicyConfig, optim: OptimConfig) -> None:
    """Raise ValueError for what ranks cannot share."""
    if not d.shards:
        return
    whole, in_parts = d.strategy in ("zero1", "zero2"), f"implementation {optim.implementation}"
    reasons = {
        "optim.name muon": (optim.name == "muon", "it orthogonalises whole matrices, and a rank has parts of them"),
        "optim.release_gradients": (optim.release_gradients, "gradients are shared instead: take one of the two"),
        "policy.freeze_vision false": (not policy.freeze_vision, "ranks see different pictures: train it under ddp"),
        f"policy.quantize {policy.quantize}": (
            policy.quantize != "none" and not whole,
            "4-bit weights are not cut into shards: set ddp, zero1 or zero2",
        ),
        f"optim.{in_parts}": (
            optim.implementation in ("8bit", "paged_8bit"),
            "8-bit moments are of whole weights: the shared ones are fp32, or set ddp",
        ),
        "optim.implementation cpu": (
            optim.implementation == "cpu" and not d.offload_optimizer,
            "it steps what distributed.offload_optimizer keeps on the host, with zero1 to zero3",
        ),
        "optim.bf16 stochastic": (optim.bf16 == "stochastic", "set master: the fp32 copies are shared"),
    }
    for what, (wrong, why) in reasons.items():
        if wrong:
            raise ValueError(f"{what} with distributed.strategy {d.strategy!r}: {why}")


class CheckpointConfig(_Section):
    every: int = Field(10, ge=1, description="Steps between checkpoints")
    keep_last: int = Field(2, ge=1, description="Checkpoints kept, the newest")
    keep_best: int = Field(0, ge=0, description="Checkpoints kept beside them, the best by `metric`")
    metric: str | None = Field(
        None, description="Logged metric, its mean since the checkpoint before; reward, or -loss where lower is better"
    )

    @model_validator(mode="after")
    def _refuse(self) -> CheckpointConfig:
        if self.keep_best and not self.metric:
            raise ValueError("keep_best needs metric: by which logged number a checkpoint is the best, such as reward")
        if self.metric is not None and not self.keep_best:
            raise ValueError("metric without keep_best would do nothing: set keep_best above 0")
        return self


class EvaluateConfig(_Section):
    requests: int = Field(200, ge=0, description="Held-out requests judged before and after; 0 skips the bench")
    temperature: float = Field(0.6, ge=0, description="Sampling temperature of the bench")
    top_p: float = Field(0.9, gt=0, le=1, description="Nucleus of the bench")


class EvolveConfig(_Section):
    """`genevolve-fast evolve`."""

    name: str = Field("evolve", description="Run folder under `runs/`")
    seed: int = Field(0, description="Seed of data order and sampling")
    steps: int = Field(40, ge=1, description="Optimizer steps")
    minutes: float | None = Field(None, gt=0, description="Stop after the step that passes this wall time")
    pool_size: int = Field(2000, ge=1, description="Requests the sandbox makes; an epoch shuffles them anew")
    adv_estimator: Literal["grpo", "dr_grpo", "rloo"] = Field("grpo", description="Advantage of a rollout in its group")
    teacher: Literal["live", "ema", "base"] = Field(
        "live", description="Weights of the teacher: the student's, their running average, or the start's"
    )
    ema_rate: float | None = Field(None, gt=0, lt=1, description="Student's share in each update of the ema; 0.05")
    teacher_gate: Literal["all", "below_best", "below_mean"] = Field(
        "all", description="Rollouts with experience worth a teacher pass, by reward in their group"
    )
    max_tokens_per_microbatch: int = Field(16384, ge=1, description="Tokens packed into one forward and backward")
    head_workspace_mb: float | None = Field(None, gt=0, description="Logits in memory at once, MiB; none: four blocks")
    max_failed_share: float = Field(0.5, ge=0, le=1, description="Refuse to train on a step with more failed rollouts")
    threads: int | None = Field(None, ge=1, description="CPU threads; none: torch's default")
    trainer_gpus: list[NonNegativeInt] = Field(
        default_factory=list, description="Visible GPUs that train, by index; none: those that rollout_gpus leaves"
    )
    rollout_gpus: list[NonNegativeInt] = Field(
        default_factory=list, description="Visible GPUs on which the run starts its servers; none: it starts none there"
    )
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    world: WorldConfig = Field(default_factory=WorldConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    process: ProcessConfig = Field(default_factory=ProcessConfig)
    renderer: RendererConfig = Field(default_factory=RendererConfig)
    judge: JudgeConfig = Field(default_factory=JudgeConfig)
    summarizer: SummarizerConfig = Field(default_factory=SummarizerConfig)
    embedder: EmbedderConfig = Field(default_factory=EmbedderConfig)
    objective: Objective = Field(default_factory=Objective)
    experience: ExperienceConfig = Field(default_factory=ExperienceConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)

    @model_validator(mode="before")
    @classmethod
    def _objective(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("objective"), dict):
            data = data | {"objective": Objective(**data["objective"])}
        if isinstance(data, dict) and data.get("teacher") == "ema" and data.get("ema_rate") is None:
            data = data | {"ema_rate": 0.05}
        return data

    @model_validator(mode="after")
    def _refuse(self) -> EvolveConfig:
        refuse_shards(self.distributed, self.policy, self.optim)
        o, r, e = self.objective, self.rollout, self.experience
        if r.num_generations < 2:
            raise ValueError("rollout.num_generations must be at least 2: one rollout has no group to compare with")
        if r.temperature == 0:
            raise ValueError("rollout.temperature is 0: greedy rollouts are equal, every advantage would be zero")
        if r.replay_sampling_mask and r.top_p == 1:
            raise ValueError("rollout.replay_sampling_mask with rollout.top_p 1 would do nothing: every id is kept")
        if o.sdl_coef and not e.enabled:
            raise ValueError("objective.sdl_coef > 0 needs experience.enabled: the teacher would see nothing new")
        if e.enabled and not o.sdl_coef:
            raise ValueError("experience.enabled with objective.sdl_coef 0 compares rollouts for nothing; disable one")
        taught = ("teacher", "teacher_gate", "summarizer", "embedder")
        if not e.enabled and (changed := [n for n in taught if getattr(self, n) != _default(n)]):
            raise ValueError(f"{', '.join(changed)} without experience.enabled would do nothing: there is no teacher")
        if self.data.path != "sandbox" and self.pool_size != _default("pool_size"):
            raise ValueError("pool_size is of data.path 'sandbox': data.limit says how many requests are taken")
        if self.data.path != "sandbox" and self.world.categories:
            raise ValueError(f"world.categories would do nothing: data.path {self.data.path!r} has its own requests")
        if self.ema_rate is not None and self.teacher != "ema":
            raise ValueError(f"ema_rate belongs to teacher 'ema': teacher {self.teacher!r} keeps no average")
        _refuse_precision(self.policy, self.optim)
        if self.optim.release_gradients:
            raise ValueError(
                "optim.release_gradients cannot work in evolve: a layer's gradient is complete only after the last "
                "reply's backward and the prefix's, when all layers hold one; lower memory by policy.lora.rank"
            )
        if self.policy.lora.dropout:
            raise ValueError("policy.lora.dropout must be 0 in evolve: log-probs must be repeatable; sft may use it")
        if o.rollout_is == "sequence":
            raise ValueError("objective.rollout_is 'sequence' needs old log-probs, and one update a batch makes none")
        if o.sdl_select == "batch":
            raise ValueError("objective.sdl_select 'batch' selects within one call, but gradients are accumulated here")
        if r.max_rounds < 1 + min(r.max_tool_calls, 1):
            raise ValueError("rollout.max_rounds 1 leaves no turn for rollout.max_tool_calls > 0")
        if self.policy.path == "sandbox:new":
            raise ValueError("policy.path 'sandbox:new' is random: run `genevolve-fast sft` first")
        if self.tools.kind != "sandbox" and self.tools.timeout_s > r.tool_timeout_s:
            raise ValueError("tools.timeout_s exceeds rollout.tool_timeout_s: the session would stop waiting first")
        adapter_alone = self.policy.lora.rank and not r.vllm.merge_lora
        if r.vllm.bucket_mb != _plain(VllmConfig, "bucket_mb") and (adapter_alone or r.vllm.tensor_parallel_size > 1):
            raise ValueError(
                "rollout.vllm.bucket_mb would do nothing: an adapter alone, and tensor_parallel_size > 1, go by files"
            )
        for name in ("server", "vllm"):
            if getattr(r, name).merge_lora and not self.policy.lora.rank:
                raise ValueError(f"rollout.{name}.merge_lora without policy.lora.rank: there is no adapter to merge")
        if r.engine == "server" and r.server.sync == "nccl" and self.policy.lora.rank and not r.server.merge_lora:
            raise ValueError(
                "rollout.server.sync 'nccl' sends whole weights: an adapter needs sync 'disk', or merge_lora"
            )
        if self.policy.quantize != "none":
            if r.engine == "vllm" and not r.vllm.merge_lora:
                raise ValueError(
                    "policy.quantize with rollout.engine 'vllm' needs rollout.vllm.merge_lora: its base is the "
                    "folder's, not the 4-bit one under the adapter"
                )
            if r.engine == "server" and not r.server.merge_lora and not r.server.verify_every:
                raise ValueError(
                    "policy.quantize with an adapter sent alone needs rollout.server.verify_every > 0: nothing else "
                    "tells a server with the 4-bit base's values from one with the folder's; or set merge_lora"
                )
        self._refuse_gpus()
        self._refuse_staleness()
        self._refuse_process()
        if self.checkpoint.every > self.steps and self.minutes is None:
            raise ValueError(f"checkpoint.every {self.checkpoint.every} exceeds steps {self.steps}: nothing to resume")
        return self

    def _refuse_process(self) -> None:
        """What belongs to the agent's rollouts, where they are processes."""
        if not self.process.enabled:
            return
        limits = ("max_tool_calls", "max_rounds", "observe_images", "tool_timeout_s")
        idle = [f"rollout.{n}" for n in limits if getattr(self.rollout, n) != _plain(RolloutConfig, n)]
        idle += ["tools"] * (self.tools != _default("tools"))
        idle += ["world.system_prompt"] * (self.world.system_prompt != "short")
        if idle:
            raise ValueError(f"{', '.join(idle)} with process.enabled would do nothing: a process calls no tools")
        if self.renderer.kind == "process":
            raise ValueError(
                "renderer.kind process with process.enabled: the policy grows the picture, a renderer draws"
            )
        if self.data.path == "sandbox":
            _refuse_searched(self.world, "process.enabled")

    def _refuse_gpus(self) -> None:
        r, s = self.rollout, self.rollout.server
        if r.engine != "server":
            if named := [n for n in ("trainer_gpus", "rollout_gpus") if getattr(self, n)]:
                raise ValueError(
                    f"{', '.join(named)} with rollout.engine {r.engine!r}: it samples where the policy trains; set "
                    "rollout.engine=server, or choose the trainer's GPU by CUDA_VISIBLE_DEVICES"
                )
            return
        for name in ("trainer_gpus", "rollout_gpus"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names a GPU twice")
        if shared := sorted(set(self.trainer_gpus) & set(self.rollout_gpus)):
            raise ValueError(
                f"trainer_gpus and rollout_gpus share GPU {shared[0]}: a server keeps its memory all the time"
            )
        if self.rollout_gpus and (s.urls or s.cpu_servers):
            other = "urls" if s.urls else "cpu_servers"
            raise ValueError(f"rollout_gpus with rollout.server.{other}: choose one of them")
        if not (s.urls or s.cpu_servers or self.rollout_gpus):
            raise ValueError(
                "engine 'server' needs server.urls, the servers that sample, or rollout_gpus for servers of the run; "
                "without GPUs rollout.server.cpu_servers"
            )
        if len(self.rollout_gpus) % s.tensor_parallel_size:
            raise ValueError(
                f"rollout_gpus names {len(self.rollout_gpus)} GPUs, and rollout.server.tensor_parallel_size "
                f"{s.tensor_parallel_size} of them share a server"
            )

    def _refuse_staleness(self) -> None:
        if not self.rollout.staleness:
            return
        if self.objective.rollout_is == "none":
            raise ValueError(
                "rollout.staleness 1 trains on rollouts of weights one update old: without objective.rollout_is token "
                "the gradient would be that of the old policy's samples"
            )
        if self.rollout.top_p < 1 and not self.rollout.replay_sampling_mask:
            raise ValueError(
                "rollout.staleness 1 with rollout.top_p below 1 needs rollout.replay_sampling_mask: the correction "
                "divides by log-probs over the ids that top-p kept, and the trainer's must be over the same"
            )


class SftDataConfig(_Section):
    path: str = Field(
        "sandbox:demonstrations",
        description="Conversations of {messages, images}; `sandbox:demonstrations`: the sandbox's script writes them, "
        "an agent's; `sandbox:processes`: those of pictures that grow",
    )
    demonstrations: int = Field(12000, ge=1, description="Conversations the sandbox's script writes")
    experience_share: float = Field(0.3, ge=0, le=1, description="Share of them that carry an experience and obey it")
    recitations: int = Field(0, ge=0, description="Word lists `sandbox:new` repeats first, to learn to copy")
    cutoff: int = Field(32768, ge=2, description="Longer samples are dropped and counted")
    strict: bool = Field(True, description="Refuse the first bad row; false: leave bad rows out and count them")
    workers: int | None = Field(None, ge=1, description="Threads that tokenize ahead; none: one a core, at most 8")
    image_cache_mb: int = Field(2048, ge=0, description="Host memory, in MiB, for decoded pictures and their patches")

    @model_validator(mode="after")
    def _refuse(self) -> SftDataConfig:
        if self.scripted and not self.strict:
            raise ValueError(f"strict false with path {self.path!r} would do nothing: no row of it is bad")
        return self

    @property
    def scripted(self) -> bool:
        return self.path in ("sandbox:demonstrations", "sandbox:processes")


class SftConfig(_Section):
    """`genevolve-fast sft`."""

    name: str = Field("sft", description="Run folder under `runs/`")
    seed: int = Field(0, description="Seed of data order and, for `sandbox:new`, of the weights")
    epochs: int = Field(2, ge=1, description="Passes over the data")
    minutes: float | None = Field(None, gt=0, description="Stop after the step that passes this wall time")
    batch_size: int = Field(32, ge=1, description="Samples of one optimizer step")
    max_tokens_per_microbatch: int = Field(16384, ge=1, description="Tokens packed into one forward and backward")
    save_dtype: Literal["float32", "bfloat16"] | None = Field(None, description="Dtype of the final folder's weights")
    threads: int | None = Field(None, ge=1, description="CPU threads; none: torch's default")
    policy: PolicyConfig = Field(default_factory=PolicyConfig)
    world: WorldConfig = Field(default_factory=WorldConfig)
    data: SftDataConfig = Field(default_factory=SftDataConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-5, warmup_ratio=0.02, schedule="cosine"))
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig(every=200))
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)

    @model_validator(mode="after")
    def _refuse(self) -> SftConfig:
        refuse_shards(self.distributed, self.policy, self.optim)
        _refuse_precision(self.policy, self.optim)
        if self.optim.release_gradients:
            needs = {
                "batch_size 1": self.batch_size == 1,  # several micro-batches would update on parts of the gradient
                "optim.max_grad_norm null": self.optim.max_grad_norm is None,  # the norm is known at the end only
                "optim.name adamw": self.optim.name == "adamw",
                "policy.gradient_checkpointing": self.policy.gradient_checkpointing,
                "policy.lora.dropout 0": not self.policy.lora.dropout,
                "optim.skip_nonfinite 0": not self.optim.skip_nonfinite,  # layers have stepped when the loss is known
            }
            if missing := [name for name, there in needs.items() if not there]:
                raise ValueError(f"optim.release_gradients needs {', '.join(missing)}")
        if self.world.system_prompt != "short":
            raise ValueError("world.system_prompt does nothing in sft: the conversations hold their own")
        if self.policy.path == "sandbox:new" and self.policy.lora.rank:
            raise ValueError("policy.lora.rank with 'sandbox:new' would leave the random weights as they are")
        if self.policy.path == "sandbox:new" and self.policy.freeze_vision:
            raise ValueError("policy.freeze_vision with 'sandbox:new' would freeze a random vision tower")
        if not self.data.scripted and self.policy.path == "sandbox:new":
            raise ValueError(
                "policy.path 'sandbox:new' takes its tokenizer from data.path 'sandbox:demonstrations' or "
                "'sandbox:processes'"
            )
        if self.world.categories and not self.data.scripted:
            raise ValueError(f"world.categories would do nothing: data.path {self.data.path!r} has its own requests")
        if self.data.path == "sandbox:processes":
            _refuse_searched(self.world, "data.path 'sandbox:processes'")
        if self.data.recitations and self.policy.path != "sandbox:new":
            raise ValueError("data.recitations teach a random policy to copy: they belong to policy.path 'sandbox:new'")
        return self


def _refuse_searched(world: WorldConfig, needs: str) -> None:
    """Raises ValueError where the sandbox would ask a process for what only a search finds."""
    if not world.categories or set(world.categories) & set(SEARCHED):
        raise ValueError(
            f"{needs} needs world.categories of count_row, text_sign and relation: a process calls no tools, and what "
            f"{' and '.join(SEARCHED)} ask for has to be searched"
        )


def _refuse_precision(policy: PolicyConfig, optim: OptimConfig) -> None:
    """Raises ValueError where optim.bf16 would do nothing, or the implementation cannot do without it."""
    trained = "LoRA's factors are float32" if policy.lora.rank else "policy.dtype is float32"
    wide = policy.lora.rank or policy.dtype == "float32"
    if wide and optim.bf16 != "nearest":
        raise ValueError(f"optim.bf16 {optim.bf16!r} would do nothing: {trained}")
    if not wide and optim.implementation == "cpu" and optim.bf16 != "master":
        raise ValueError("optim.implementation 'cpu' keeps fp32 weights in host memory: say so by optim.bf16 master")


def _default(name: str) -> Any:
    return _plain(EvolveConfig, name)


def _plain(section: type[BaseModel], name: str) -> Any:
    """What a field holds where nothing is set."""
    return section.model_fields[name].get_default(call_default_factory=True)


def load_config(cls: type[C], path: str | Path | None, overrides: list[str] | None = None) -> C:
    """Read YAML at `path`, apply `section.field=value` overrides (values in YAML). Raises ConfigError."""
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is not a mapping of fields")
    try:
        set_fields(data, overrides or (), "--set")
    except FieldError as error:
        raise ConfigError(str(error)) from None
    return parse_config(cls, data, str(path or "config"))


def parse_config(cls: type[C], data: dict[str, Any], where: str = "config") -> C:
    """Validate `data`. Raises ConfigError with one line per wrong field."""
    try:
        return cls(**data)
    except ValidationError as error:
        lines = [f"  {line}" for line in wrong_fields(error)]
        raise ConfigError("\n".join([f"{where} cannot be used:", *lines])) from error
    except (TypeError, ValueError) as error:  # Objective refuses its own fields
        raise ConfigError(f"{where} cannot be used: {error}") from error
