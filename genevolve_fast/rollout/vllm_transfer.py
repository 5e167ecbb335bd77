"""The trainer's side of vLLM's weight transfer: the policy as a source of tensors, by CUDA IPC or NCCL."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Weights = Callable[[], Mapping[str, Tensor]]


def policy_source(weights: Weights, dtype: torch.dtype, device: torch.device) -> Any:
    """vLLM's WeightSource over the tensors that `weights` gives each time, in `dtype` on `device`, one at a time."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        @cached_property
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, dtype, tuple(tensor.shape)) for name, tensor in weights().items()]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights().items():
                yield name, tensor.detach().to(device, dtype)

    return PolicySource()


def ipc_sender(client: Any, source: Any, bucket_bytes: int) -> Any:
    """Sends buckets of at most `bucket_bytes` to a vLLM on the same GPU; `send_weights()` is one update."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

    info = IPCTrainerInitInfo(rank=0, packed=True, packed_buffer_size_bytes=bucket_bytes)
    return IPCTrainerWeightTransferEngine.trainer_init(init_info=info, client=client, source=source)


def nccl_sender(url: str, source: Any, workers: int, timeout_s: float) -> Any:
    """Broadcasts to the `workers` GPUs of the server at `url`."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    info = NCCLTrainerInitInfo(
        rank=0, master_address=_own_address(url), master_port=_free_port(), world_size=workers + 1
    )
    client = HTTPVLLMWeightSyncClient(url, timeout=timeout_s)
    return NCCLTrainerWeightTransferEngine.trainer_init(init_info=info, client=client, source=source)


def _own_address(url: str) -> str:
    """This machine's address on the way to the server."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
