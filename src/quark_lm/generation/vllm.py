"""Completions by vLLM, through its public API: in this process (`vllm.LLM`), or by a running `vllm serve` over HTTP.

Token ids go in and token ids come out; no text is tokenized again. Each sample is a request with a seed of its own. A
reward token gets the lowest logit bias that vLLM takes, and a completion that holds one all the same is refused. When
the policy's weights have changed they are saved as a checkpoint, an adapter merged in, which vLLM reloads; a server
that was started with the NCCL backend of weight transfer gets them over that.

Not run on a GPU. Written against the source and documentation of vLLM 0.22 to 0.32: `/v1/completions` with
`return_token_ids`; `reload_weights` with `weights_path` (docs/training/layerwise.md); weight transfer as of 0.29
(docs/training/weight_transfer); `/weight_info`, which older ones lack (pull request 49040).
The dial needs the logits of two prompts at each token, which this API does not give: that is hf.py's job.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.metadata
import json
import os
import shlex
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import tenacity
import torch

from ..errors import ConfigError, GenerationError
from ..files import first_line
from ..shown import url_shown
from . import Dial, GenerationSettings, turned

if TYPE_CHECKING:
    from torch import nn

    from ..config import QuarkConfig

# Samples of one batch, all under way at once: vLLM's own default for the sequences that it works on at a time.
ROWS = 256
# vLLM clamps a logit bias to this; e to the -100 is never drawn unless a logit leads by as much.
_LOWEST_BIAS = -100.0
# Seconds before the first retry, each later one waits twice as long; and to connect, which a server that is up does.
_FIRST_PAUSE, _LONGEST_PAUSE, _CONNECT = 1.0, 15.0, 5.0
_DEFAULT_URL = "http://127.0.0.1:8000"
# The first vLLM whose trainer's side of weight transfer is the one that is called here.
_TRANSFER = (0, 29)

Batch = tuple[list[int], list[list[int]]]


def vllm_completer(
    args: QuarkConfig,
    eos_ids: Sequence[int],
    *,
    dtype: torch.dtype,
    num_processes: int,
    served: Sequence[str],
    tell: Callable[[str], None],
) -> VLLMColocated | VLLMServer:
    """The completer that the vllm_ fields ask for.

    Args:
        dtype: in which the policy samples; a server has its own.
        served: models that a server may serve, beside the saved checkpoint.
        tell: shows a line of text.
    Raises: ConfigError when vLLM is missing, or the fields cannot work with so many processes.
    """
    if args.vllm_mode == "server":
        url = args.vllm_server_base_url or _DEFAULT_URL
        return VLLMServer(
            url,
            eos_ids,
            args.generation_batch_size,
            timeout=args.vllm_server_timeout,
            served=served,
            group_port=args.vllm_group_port,
            tell=tell,
        )
    if num_processes > 1 and args.vllm_tensor_parallel_size > 1:
        raise ConfigError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} spreads one model over the GPUs on which"
            f" {num_processes} processes have a model each. Set it to 1, train in one process, or use"
            " vllm_mode='server'."
        )
    options: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
        "tensor_parallel_size": args.vllm_tensor_parallel_size,
        "max_model_len": args.vllm_max_model_length,
        "enable_sleep_mode": args.vllm_enable_sleep_mode,
        "generation_config": "vllm",  # else the model's own file would set what a request leaves out
    }
    if num_processes > 1:
        options["distributed_executor_backend"] = "external_launcher"  # torchrun has started the processes
    return VLLMColocated(eos_ids, args.generation_batch_size, options)


class VLLMColocated:
    """Completes prompts with a `vllm.LLM` in this process, each process one, on the GPU that also trains.

    Weights come from the saved checkpoint alone: CUDA IPC, the transfer for one GPU, cannot be opened by the process
    that made it, and with several processes vLLM runs in theirs.

    Args:
        eos_ids: tokens that end a completion; they stay its last id.
        batch_rows: samples of a batch; None: ROWS.
        options: of `vllm.LLM`, but for the model.

    Attributes:
        holds: the caller's mark of the weights that it has; None when it has to get them.
        saved: the same of the checkpoint on disk.
    """

    needs_checkpoint = True

    def __init__(self, eos_ids: Sequence[int], batch_rows: int | None, options: dict[str, Any]) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"use_vllm=True with vllm_mode='colocate' needs vLLM, which cannot be imported ({first_line(error)})."
                " pip install 'quark-lm[vllm]', or leave use_vllm out."
            ) from error
        self._vllm = vllm
        self._llm: Any = None
        self._asleep = False
        self.eos_ids, self.batch_rows, self.options = tuple(eos_ids), batch_rows, options
        self.holds: int | None = None
        self.saved: int | None = None

    def fitting_rows(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> int:
        """Samples of a batch; vLLM itself fits them to the memory."""
        return ROWS

    def load(self, folder: Path, version: str, model: nn.Module, *, first: bool) -> None:
        """Reads the checkpoint in `folder`, on every rank. The other arguments are for a server."""
        if self._llm is None:
            self._llm = self._vllm.LLM(model=str(folder), **self.options)
            return
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()  # what it holds was computed by the weights before

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        dials: Sequence[Dial] = (),
        skip: Collection[int] = (),
    ) -> Iterator[Batch]:
        """As `hf.HFCompleter.complete`. Raises: ConfigError for the dial; GenerationError for an answer without use."""
        _refuse_dial(dials, len(prompts))
        try:
            for batch in _batches(len(prompts), self.batch_rows or ROWS, skip):
                outputs = self._llm.generate(
                    [{"prompt_token_ids": list(prompts[i])} for i in batch],
                    [
                        self._vllm.SamplingParams(**sampling(settings, self.eos_ids, seeds[i]), detokenize=False)
                        for i in batch
                    ],
                    use_tqdm=False,
                )
                completions = []
                for output in outputs:
                    ids, reason = list(output.outputs[0].token_ids), output.outputs[0].finish_reason
                    wrong = _wrong(ids, reason, settings, self.eos_ids)
                    if wrong is not None:
                        raise GenerationError(f"vLLM {wrong[0]}. {wrong[1]}")
                    completions.append(ids)
                yield batch, completions
        finally:
            if self.options.get("enable_sleep_mode"):
                self._llm.sleep(level=2)  # level 2 forgets the weights, which will be others anyway
                self._asleep, self.holds = True, None


class VLLMServer:
    """Completes prompts by asking a running `vllm serve`, a request a sample; every rank asks for its own.

    The server needs `VLLM_SERVER_DEV_MODE=1`, without which it lets nobody change its weights, and no other client.

    Args:
        url: of the server, without /v1.
        eos_ids: tokens that end a completion; they stay its last id.
        batch_rows: samples of a batch, all asked for at once; None: ROWS.
        timeout: seconds that one answer may take, and that a server which cannot be reached is waited for.
        served: models that it may serve, beside the checkpoint that `load` names.
        group_port: of the rendezvous for NCCL.
        tell: shows a line of text.

    Attributes:
        holds, saved: as those of `VLLMColocated`.
    """

    def __init__(
        self,
        url: str,
        eos_ids: Sequence[int],
        batch_rows: int | None = None,
        *,
        timeout: float = 240.0,
        served: Sequence[str] = (),
        group_port: int = 51216,
        tell: Callable[[str], None] = print,
    ) -> None:
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ConfigError(
                f"vllm_server_base_url={url_shown(url)!r} is no URL ({type(error).__name__}). Write http://host:port."
            ) from None
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.path.rstrip("/").endswith("/v1"):
            raise ConfigError(
                f"vllm_server_base_url={url_shown(url)!r} is no URL of a server. Write http://host:port, without /v1."
            )
        self.url = str(parsed).rstrip("/")
        self._shown = url_shown(self.url).rstrip("/")
        self.eos_ids, self.batch_rows = tuple(eos_ids), batch_rows
        self._timeout, self._served, self._group_port, self._tell = timeout, tuple(served), group_port, tell
        self.holds: int | None = None
        self.saved: int | None = None
        self._folder: Path | None = None
        self._version = ""
        self._name: str | None = None  # of the model, in a request; None before the server was asked
        self._most_tokens: int | None = None
        self._over_nccl = False
        self._transfer: Any = None
        self._lost = False  # a connection broke: what answers next may be another process, with other weights
        self._heard_at = 0.0  # time.monotonic() of the last good answer

    @property
    def needs_checkpoint(self) -> bool:
        """Whether `load` reads the folder; at first always, since a server may have to be started from it."""
        return not self._over_nccl

    def fitting_rows(self, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> int:
        """Samples of a batch; vLLM itself fits them to the memory."""
        return ROWS

    def load(self, folder: Path, version: str, model: nn.Module, *, first: bool) -> None:
        """Gives the server the policy's weights; rank 0 does it (`first`), the others note which they are.

        Args:
            folder: the checkpoint; the server has to see it by the same absolute path.
            version: of the weights, by which a server that has lost them is known.
            model: the policy, for NCCL.
        Raises: ConfigError when the server serves another model or does not take weights; GenerationError when it does
            not answer.
        """
        self._folder, self._version = folder.resolve(), version
        if not first:
            return

        async def once() -> None:
            async with self._client() as client:
                await self._connect(client)
                await self._push(client, model)

        _run(self._retried(once))

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: GenerationSettings,
        *,
        dials: Sequence[Dial] = (),
        skip: Collection[int] = (),
    ) -> Iterator[Batch]:
        """As `hf.HFCompleter.complete`. What was answered is yielded before an error is raised.

        Raises: ConfigError for the dial, or a prompt that is too long for the server; GenerationError when the server
            does not answer, or answers what cannot be used.
        """
        _refuse_dial(dials, len(prompts))
        _run(self._retried(self._begin))
        longest = max(map(len, prompts), default=0)
        if self._most_tokens is not None and longest + settings.max_completion_length > self._most_tokens:
            raise ConfigError(
                f"The vLLM server at {self._shown} reads {self._most_tokens} tokens, but a prompt with its reward token"
                f" has {longest} and a completion may have {settings.max_completion_length}. Start it with a larger"
                " --max-model-len, or lower max_completion_length."
            )
        for batch in _batches(len(prompts), self.batch_rows or ROWS, skip):
            bodies = {
                i: {
                    "prompt": list(prompts[i]),
                    "return_token_ids": True,
                    **sampling(settings, self.eos_ids, seeds[i]),
                }
                for i in batch
            }
            answered: dict[int, list[int]] = {}
            error: Exception | None = None
            try:
                _run(self._batch(bodies, settings, answered))
            except Exception as raised:
                error = raised
            if answered:
                done = sorted(answered)
                yield done, [answered[i] for i in done]
            if error is not None:
                raise error

    async def _batch(
        self, bodies: dict[int, dict[str, Any]], settings: GenerationSettings, answered: dict[int, list[int]]
    ) -> None:
        """Fills `answered`; what fails in a way that may pass is asked again, after a pause that grows."""
        async with self._client(len(bodies)) as client:

            async def once() -> None:
                if self._lost:
                    await self._restore(client)
                rest = [i for i in bodies if i not in answered]
                outcomes = await asyncio.gather(
                    *(self._completion(client, bodies[i], settings) for i in rest), return_exceptions=True
                )
                failures = []
                for i, outcome in zip(rest, outcomes, strict=True):
                    if isinstance(outcome, BaseException):
                        failures.append(outcome)
                    else:
                        answered[i] = outcome
                if failures:  # one that does not pass first
                    raise min(failures, key=lambda failure: isinstance(failure, _Unanswered))

            await self._retried(once)

    async def _completion(
        self, client: httpx2.AsyncClient, body: dict[str, Any], settings: GenerationSettings
    ) -> list[int]:
        data = await self._ask(client, "POST", "/v1/completions", {"model": self._name, **body})
        try:
            choice = data["choices"][0]
            ids, prompt, reason = choice.get("token_ids"), choice.get("prompt_token_ids"), choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._error(f"answered no completion ({str(data)[:80]!r})", "It is no vLLM server.") from None
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise self._error("answered no token ids, and text would be tokenized anew", "Use vLLM 0.22 or newer.")
        if prompt is not None and prompt != body["prompt"]:
            raise self._error("completed another prompt than it was given", "Look at its options and its log.")
        if reason == "abort":  # its weights are being changed, or it is going down
            raise _Unanswered("broke off a completion", "Look at its log; nobody else may change its weights.")
        wrong = _wrong(ids, reason, settings, self.eos_ids)
        if wrong is not None:
            raise self._error(*wrong)
        return ids

    # -- the server's weights

    async def _begin(self) -> None:
        """Before each call: this rank knows the server, which has the weights that it was given."""
        async with self._client() as client:
            if self._name is None:
                await self._connect(client)
            if self._folder is None:
                return
            told = await self._ask(client, "GET", "/weight_info", may_lack=True)
            if self._lost or (told is not None and told.get("weight_version") != self._version):
                await self._restore(client)

    async def _connect(self, client: httpx2.AsyncClient) -> None:
        """Raises: ConfigError unless the server serves the model and takes weights; _Unanswered when it is not up."""
        data = await self._ask(client, "GET", "/v1/models")
        try:
            card = data["data"][0]
            name, root, most = card["id"], card.get("root") or card["id"], card.get("max_model_len")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._error(f"told no model ({str(data)[:80]!r})", "It is no vLLM server.") from None
        wanted = [*self._served, *([str(self._folder)] if self._folder is not None else [])]
        if wanted and not any(_same_model(root, one) for one in wanted):
            raise ConfigError(
                f"The vLLM server at {self._shown} serves {root}, but this run trains {wanted[0]}, whose weights"
                f" would not fit. Start it ({self._start()})."
            )
        info = await self._ask(client, "GET", "/server_info?config_format=json", may_lack=True)
        if info is None:
            raise ConfigError(
                f"The vLLM server at {self._shown} lets nobody change its weights, so it would sample from the original"
                f" model for ever. Start it ({self._start()})."
            )
        config = info.get("vllm_config") if isinstance(info, dict) else None
        transfer = config.get("weight_transfer_config") if isinstance(config, dict) else None
        wants_nccl = isinstance(transfer, dict) and transfer.get("backend") == "nccl"
        self._over_nccl = wants_nccl and torch.cuda.is_available() and _vllm_version() >= _TRANSFER
        self._name, self._most_tokens = str(name), most if isinstance(most, int) else None

    async def _push(self, client: httpx2.AsyncClient, model: nn.Module | None) -> None:
        if self._over_nccl and model is not None:
            self._send(model)
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}}
            await self._ask(client, "POST", "/collective_rpc", body)
        await self._ask(client, "POST", "/reset_prefix_cache")  # it was computed by the weights before
        await self._ask(client, "POST", "/update_weight_version", {"new_version": self._version}, may_lack=True)
        self._lost = False

    async def _restore(self, client: httpx2.AsyncClient) -> None:
        """Gives a server that was started anew the weights once more."""
        if self._folder is None:  # nobody gave it any
            self._lost = False
            return
        if self._over_nccl:
            raise self._error("has lost the policy's weights, and its NCCL group with them", "Let it start.")
        await self._connect(client)
        await self._push(client, None)
        self._tell(f"The vLLM server at {self._shown} had lost the policy's weights; it has them again.")

    def _send(self, model: nn.Module) -> None:
        """The policy's weights over NCCL, by vLLM's own engine for trainers."""
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            ModuleSource,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip

        try:
            with torch.cuda.device(next(model.parameters()).device):
                if self._transfer is None:
                    workers = httpx2.get(f"{self.url}/get_world_size", timeout=self._timeout, trust_env=False).json()
                    weights = _MergedWeights()
                    weights.take(model)
                    engine = WeightTransferTrainerFactory.trainer_init(
                        init_info=NCCLTrainerInitInfo(
                            master_address=get_ip(),
                            master_port=self._group_port,
                            world_size=workers["world_size"] + 1,
                            rank=0,
                        ),
                        client=HTTPVLLMWeightSyncClient(self.url, timeout=self._timeout),
                        source=ModuleSource(weights),
                    )
                    self._transfer = engine, weights
                engine, weights = self._transfer
                weights.take(model)
                engine.send_weights()
                weights.plain = None  # a merged copy is as large as the model
        except Exception as error:  # of whichever library vLLM's engine uses
            told = f"did not take the weights over NCCL ({first_line(error)})"
            raise self._error(told, "Look at its log.") from error

    # -- HTTP

    def _client(self, connections: int = 1) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=self.url,
            timeout=httpx2.Timeout(self._timeout, connect=min(_CONNECT, self._timeout)),
            limits=httpx2.Limits(max_connections=connections),
            trust_env=False,
        )

    async def _ask(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Any = None, may_lack: bool = False
    ) -> Any:
        """The JSON of a good answer, {} where it has none; None for a path that the server lacks and may lack.

        Raises: _Unanswered for what may pass; ConfigError or GenerationError for what will not.
        """
        try:
            response = await client.request(method, path, json=body)
        except httpx2.ReadTimeout as error:
            raise _Unanswered(
                f"gave no answer within {self._timeout:g} s",
                "Raise vllm_server_timeout, or lower generation_batch_size.",
            ) from error
        except httpx2.RequestError as error:
            self._lost = True
            raise _Unanswered(f"cannot be reached ({first_line(error)})", f"Start it ({self._start()}).") from error
        status = response.status_code
        if status == 404 and may_lack:
            return None
        if response.is_success:
            self._heard_at = time.monotonic()
            try:
                return response.json() if response.content else {}
            except ValueError as error:
                raise self._error(f"answered what is no JSON{_excerpt(response)}", "It is no vLLM server.") from error
        what = f"answered {status} to {path.partition('?')[0]}{_excerpt(response)}"
        # an engine that has died answers 500 until its server is gone too; a checkpoint that cannot be read stays so
        if status in (408, 425, 429) or (status >= 500 and (path == "/v1/completions" or status != 500)):
            raise _Unanswered(what, "Look at its log.")
        if path == "/collective_rpc":
            raise self._error(
                f"could not load the policy's weights: it {what}",
                f"It has to see {self._folder} by that path, and to be vLLM 0.22 or newer.",
            )
        raise self._error(what, f"Look at its log, or start it ({self._start()}).")

    async def _retried(self, once: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Calls it again while what it raises may pass and the server was heard of within the time-out."""
        self._heard_at = time.monotonic()
        told = False

        def tell(state: tenacity.RetryCallState) -> None:
            nonlocal told
            failure = state.outcome.exception() if state.outcome is not None else None
            if not told and isinstance(failure, _Unanswered):
                self._tell(
                    f"The vLLM server at {self._shown} {failure.what}. Waiting {self._timeout:g} s for it."
                    f" {failure.advice}"
                )
            told = True

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_Unanswered),
            stop=lambda state: state.attempt_number > 1 and time.monotonic() - self._heard_at > self._timeout,
            wait=tenacity.wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
            before_sleep=tell,
            reraise=True,
        )
        try:
            await retrying(once)
        except _Unanswered as failure:
            raise self._error(failure.what, failure.advice) from failure

    def _error(self, what: str, advice: str) -> GenerationError:
        return GenerationError(
            f"The vLLM server at {self._shown} {what}. {advice} Then give the same command again: what was sampled is"
            " kept."
        )

    def _start(self) -> str:
        """The command that starts a server for this run."""
        model, url = self._served[0] if self._served else self._folder, httpx2.URL(self.url)
        # named: vLLM itself listens on every interface, where whoever reaches it can change its weights
        command = ["vllm", "serve", str(model), "--host", url.host, "--port", str(url.port or 80)]
        return f"VLLM_SERVER_DEV_MODE=1 {shlex.join(command)}"


def sampling(settings: GenerationSettings, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
    """The fields of one sample's draws, by the names that `SamplingParams` and `/v1/completions` share.

    Those that Quark does not set are named too: a server takes what is not named from the model's generation config.
    """
    fields: dict[str, Any] = {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": int(seed),
        "max_tokens": settings.max_completion_length,
        "min_tokens": settings.min_completion_length,
        # ours alone end a completion, whatever vLLM holds the model's end of text to be
        "stop_token_ids": list(eos_ids),
        "ignore_eos": True,
    }
    if settings.barred:
        fields["logit_bias"] = dict.fromkeys(settings.barred, _LOWEST_BIAS)
    return fields


# -- helpers


class _Unanswered(Exception):
    """A request that may go well when it is sent again."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


class _MergedWeights:
    """What `ModuleSource` reads at each transfer: the parameters of the plain model that the policy is by then."""

    def __init__(self) -> None:
        self.plain: Any = None

    def take(self, model: Any) -> None:
        from ..export import _merged
        from ..policy import causal_lm

        # on a copy: to add an adapter to the weights and take it off again would move them a little each round
        self.plain = _merged(copy.deepcopy(model)) if hasattr(model, "peft_config") else causal_lm(model)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.plain.named_parameters():
            yield name, parameter.detach()


def _refuse_dial(dials: Sequence[Dial], num: int) -> None:
    if turned(dials, num):
        raise ConfigError(
            "The dial mixes the logits of two prompts at each token, and vLLM's public API gives those of one. Use a"
            " strength of 1, or leave use_vllm out."
        )


def _batches(num: int, rows: int, skip: Collection[int]) -> Iterator[list[int]]:
    """Indices in their order, so that the samples of one prompt stand together and share its cache."""
    for start in range(0, num, rows):
        batch = [i for i in range(start, min(start + rows, num)) if i not in skip]
        if batch:
            yield batch


def _wrong(
    ids: list[int], reason: str | None, settings: GenerationSettings, eos_ids: Sequence[int]
) -> tuple[str, str] | None:
    """(what is wrong with a completion, what to do); None when it is as it was asked for."""
    if set(ids) & set(settings.barred):
        return "drew a reward token, so it does not heed logit_bias", "Look at its options."
    ended = bool(ids) and ids[-1] in eos_ids
    full = len(ids) == settings.max_completion_length
    if not (ended or full) or len(ids) > settings.max_completion_length:
        return (
            f"ended a completion after {len(ids)} tokens for the reason {reason!r}, though none of the end-of-text"
            f" tokens {list(eos_ids)} ends it",
            "Leave out the options that stop it elsewhere.",
        )
    return None


def _same_model(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and os.path.samefile(one, other))


def _vllm_version() -> tuple[int, ...]:
    """Major and minor of the vLLM that this process could import; (0,) without one."""
    try:
        text = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return (0,)
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What it returns, also where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _excerpt(response: httpx2.Response) -> str:
    """The server's own words, else the start of its answer; quoted, so that they can neither break the line nor write
    to a terminal."""
    text = response.content[:2000].decode(errors="replace").strip()
    try:
        data = json.loads(response.content)
        told = data.get("error", data.get("detail", text))
        text = str(told.get("message", told) if isinstance(told, dict) else told)
    except (ValueError, AttributeError):
        pass
    return f" ({text[:200]!r})" if text else ""
