"""What the server reads: vLLM 0.33's request fields, those we honour by value, the others only at their neutral value.

A parameter that would change the answer and that we do not implement is refused, never ignored.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genevolve_fast.protocols import Sampling

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "priority": (0,),
    "output_kind": (0, 1, 2),  # there is one answer, the final one
    "top_logprobs": (0,),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "include_reasoning": (True,),
    "parallel_tool_calls": (True,),
    "spaces_between_special_tokens": (True,),
    "routed_experts_prompt_start": (0,),
    **dict.fromkeys(
        (
            *("stop", "bad_words", "logit_bias", "allowed_token_ids", "logprob_token_ids", "prompt_logprobs"),
            *("structured_outputs", "include_stop_str_in_output", "flat_logprobs", "extra_args", "suffix", "echo"),
            *("thinking_token_budget", "repetition_detection", "skip_reading_prefix_cache", "watermarking"),
            *("features", "stream", "stream_options", "kv_transfer_params", "ec_transfer_params", "token_offsets"),
            *("parse_context", "reasoning_ended", "reasoning_parser_kwargs", "use_beam_search", "tools", "documents"),
            *("truncate_prompt_tokens", "mm_processor_kwargs", "media_io_kwargs", "add_special_tokens"),
            *("continue_final_message", "reasoning_effort", "chat_template", "prompt_embeds"),
        ),
        (),
    ),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @model_validator(mode="after")
    def _refuse_what_would_be_ignored(self) -> _Strict:
        for name, value in (self.model_extra or {}).items():
            if name not in _NEUTRAL:
                raise ValueError(f"{name}: unknown parameter")
            if value is not None and value not in (_NEUTRAL[name] or (False, "", [], {})):
                raise ValueError(f"{name}={value!r} is not supported by this server: leave it out")
        return self


class _Sampled(_Strict):
    """Fields that every request about sampling has."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = Field(default=None, ge=1)

    def sampling(self, eos: tuple[int, ...], room: int, mask: bool = False) -> Sampling:
        """`eos` end a turn unless ignore_eos; `room` tokens are left in the context; `mask`: with the ids kept."""
        stop_ids = tuple(self.stop_token_ids or ()) + (() if self.ignore_eos else eos)
        wanted = room if self.max_tokens is None else min(self.max_tokens, room)
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, wanted, stop_ids, mask)


class SamplingParams(_Sampled):
    """`logprobs` 0: the sampled tokens' log-probs, after temperature and top-p; more candidates are not returned."""

    logprobs: Literal[0] | None = None
    detokenize: bool = True  # no text is returned
    skip_special_tokens: bool = True


class GenerateRequest(_Strict):
    request_id: str | None = None
    token_ids: list[int] = Field(min_length=1)
    content_parts: list[dict[str, Any]] | None = None
    sampling_params: SamplingParams
    model: str | None = None
    return_token_ids: bool | None = None
    output_mode: Literal["tokens"] = "tokens"
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)


class _Messages(_Strict):
    messages: list[dict[str, Any]] = Field(min_length=1)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(_Sampled, _Messages):
    model: str | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    session_id: str | None = None
    request_id: str | None = None
    user: str | None = None  # a name for the provider's statistics
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self


class CompletionRequest(_Sampled):
    prompt: str | list[int]
    model: str | None = None
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: Literal[0] | None = None
    skip_special_tokens: bool = True
    return_token_ids: bool | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    session_id: str | None = None
    request_id: str | None = None
    user: str | None = None


class TokenizePrompt(_Strict):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class TokenizeMessages(_Messages):
    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Strict):
    tokens: list[int]
    model: str | None = None


class LoadAdapter(_Strict):
    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False


class UnloadAdapter(_Strict):
    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None


class Rpc(_Strict):
    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    timeout: float | None = None


class WeightCheck(_Strict):
    action: Literal["checksum", "compare", "reset"]
    baseline: dict[str, str] | None = None


class NewVersion(_Strict):
    new_version: str


class AbortRequest(_Strict):
    request_ids: list[str] | None = None


class RequestError(Exception):
    """An answer that is an error, in vLLM's ErrorResponse shape."""

    def __init__(self, message: str, status: int = 400, kind: str = "BadRequestError", param: str | None = None):
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param

    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return {"error": error}


def not_found(message: str, param: str | None = None) -> RequestError:
    return RequestError(message, 404, "NotFoundError", param)


def unavailable(message: str) -> RequestError:
    return RequestError(message, 503, "ServiceUnavailableError")
