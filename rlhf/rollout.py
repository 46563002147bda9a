"""The rollout role: vLLM engines that turn prompts into responses, tokens in and tokens out.

    engine = EngineWorker(0, 1, threads=2, model=path, stop=[3], vocab_size=4096, max_tokens=96, seed=0)
    rollout = engine.generate(index=[0, 1], prompts=[[5, 6], [7]], seeds=[1, 2], max_tokens=32, temperature=1.0)

An engine lives in its actor's process (no second process to lose; only with tensor parallelism its workers are processes below
it), is given ids and never text, and validates every id:
one id outside the vocabulary would make vLLM wait for ever.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cluster.groups import Worker
from cluster.hardware import hardware
from rlhf.adapters import write_adapter
from rlhf.buckets import Spec
from rlhf.cpu_kernels import cpu_norms
from rlhf.experience import Rollout, merge
from rlhf.fingerprints import Fingerprint
from rlhf.memory import engine_explained
from rlhf.sampling import Piece, Sampling, Wanted

# What an engine's process needs before vLLM is imported.
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the actor: its death is the actor's, seen in 0.2 s
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with the other roles; `auto` would want a NUMA node per process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ENV = {
    "TORCHDYNAMO_DISABLE": "1",  # the sampler's first compiled call costs 6 s and gains nothing
    # oneDNN keeps a program for every number of rows, which answers that end by themselves make ever new: with its default of 1,024 an
    # engine grew by 6.6 % from the 20th to the 80th rollout of 256 answers, with 64 by 4.0 and no more.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


BATCHED = 4096  # tokens of prompts that a CPU engine computes at once
BLOCK = 32  # of a CPU's KV cache: answers share whole blocks of their prompt. 8 x 8 to 128 tokens took 3.3 s, with vLLM's 128 4.6

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for; a smaller adapter is padded
MEMORY = Path("/dev/shm")


def engine_env(on_gpu: bool) -> dict[str, str]:
    return ENGINE_ENV if on_gpu else ENGINE_ENV | CPU_ENV


@dataclass
class Answers:
    """What was asked of one prompt, and what is there already."""

    asked: Wanted
    given: dict[int, Any] = field(default_factory=dict)  # which of its seeds -> vLLM's CompletionOutput

    @property
    def tokens(self) -> int:
        return len(self.asked.prompt) + sum(len(completion.token_ids) for completion in self.given.values())


class EngineWorker(Worker):
    def __init__(
        self,
        rank: int,
        world: int,
        threads: int,
        model: Path,
        stop: Sequence[int],
        vocab_size: int,
        max_tokens: int,
        seed: int,
        transport: str = "object_store",
        tensor_parallel: int = 1,
        shares: bool = False,
        adapter_rank: int = 0,
    ) -> None:
        """Load `model` for sequences of at most `max_tokens` tokens; generation ends at one of the `stop` ids.

        transport: how new weights come, see `weight_sender`.
        tensor_parallel: over how many GPUs of this actor, or processes without one, each matrix is split.
        shares: the engine's devices are others' too, whenever it sleeps.
        adapter_rank: 0, or the rank of the LoRA adapters that it is given instead of new weights (`load_adapter`).
        """
        super().__init__(rank, world, threads)
        from vllm import LLM

        hw = hardware()
        self.stop, self.vocab_size, self.max_tokens, self.transport = list(stop), vocab_size, max_tokens, transport
        self.version = "initial"
        self.adapters = 0  # so far
        self.adapter: Any = None  # vLLM's name for the one in use
        self.inbox: SimpleQueue[tuple[Sequence[Wanted], bool]] = SimpleQueue()
        with engine_explained(model, max_tokens, tensor_parallel):
            self.llm = LLM(
                str(model),
                skip_tokenizer_init=True,
                dtype="bfloat16" if hw.is_gpu else "float32",
                enforce_eager=not hw.is_gpu,
                # Further processes, of an engine that is split, would not know them.
                ir_op_priority={} if hw.is_gpu or tensor_parallel > 1 else cpu_norms(),
                max_model_len=max_tokens,
                max_num_seqs=256,
                # vLLM takes back the random numbers of a prompt that it has computed in part; generators of CPUs cannot do that.
                enable_chunked_prefill=hw.is_gpu,
                max_num_batched_tokens=None if hw.is_gpu else max(BATCHED, max_tokens),
                block_size=None if hw.is_gpu else BLOCK,
                seed=seed,
                logprobs_mode="processed_logprobs",  # of the distribution that was sampled from, temperature included
                weight_transfer_config=None if adapter_rank else {"backend": transport},
                enable_lora=adapter_rank > 0,
                max_lora_rank=next(rank for rank in LORA_RANKS if rank >= adapter_rank),
                worker_extension_cls="rlhf.weight_sync.WorkerExtension",
                disable_log_stats=True,
                tensor_parallel_size=tensor_parallel,
                # vLLM's Ray executor would ask Ray for GPUs that this actor holds already, and refuses CPUs: processes of its own.
                distributed_executor_backend="mp" if tensor_parallel > 1 else None,
                enable_sleep_mode=shares and hw.is_gpu,
                gpu_memory_utilization=0.8 if shares else 0.9,  # a sleeping role keeps its CUDA context, about 0.5 GB
            )

    def ready(self) -> str:
        """The version of the weights, once the engine stands."""
        return self.version

    def sleep(self) -> None:
        """Weights to host memory, KV cache dropped (vLLM's level 1: there need not be a weight sync before the next answer). On a
        CPU, where all is host memory already, vLLM only pauses."""
        self.llm.sleep(level=1)

    def wake(self) -> None:
        self.llm.wake_up()

    def generate(
        self, index: Sequence[int], prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int, temperature: float
    ) -> Rollout:
        """One response of at most `max_tokens` tokens per prompt; a sample's seed fixes it, whatever else is in the batch.

        Raises ValueError for an empty or over-long prompt and for ids outside the vocabulary.
        """
        asked = [Wanted(i, list(prompt), [seed]) for i, prompt, seed in zip(index, prompts, seeds, strict=True)]
        return merge([piece for piece in self.stream(asked, Sampling(max_tokens, temperature, 1), True) if isinstance(piece, Rollout)])

    def stream(self, asked: Sequence[Wanted], sampling: Sampling, last: bool) -> Iterator[Rollout | Piece]:
        """Answers as they finish, in pieces of whole prompts: a `Rollout`, its `Piece`, the next `Rollout`, ...

        Unless these are the `last`, `more` brings further ones meanwhile. Raises ValueError as `generate` does, and then has
        nothing left to do: the engine is as it was before.
        """
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        under_way: dict[str, Answers] = {}
        ready: list[Answers] = []
        size = 0

        def add(some: Sequence[Wanted]) -> None:
            self._check([one.prompt for one in some], sampling.max_tokens)
            for one in some:
                answers = Answers(one)
                for k, seed in enumerate(one.seeds):
                    request = f"{one.first + k}"
                    under_way[request] = answers
                    params = SamplingParams(
                        temperature=sampling.temperature,
                        max_tokens=sampling.max_tokens,
                        seed=seed,
                        logprobs=0,
                        stop_token_ids=self.stop,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    engine.add_request(request, TokensPrompt(prompt_token_ids=one.prompt), params, lora_request=self.adapter)

        try:
            add(asked)
            while under_way or ready or not last:
                while not last and not (self.inbox.empty() and (under_way or ready)):  # with nothing to do it waits for more
                    asked, last = self.inbox.get()
                    add(asked)
                with self.at_work("generate"):
                    for output in engine.step() if under_way else ():
                        if output.finished:
                            answers = under_way.pop(output.request_id)
                            answers.given[int(output.request_id) - answers.asked.first] = output.outputs[0]
                            if len(answers.given) == len(answers.asked.seeds):
                                ready.append(answers)
                                size += answers.tokens
                    piece = self._rollout(ready) if ready and (size >= sampling.piece_tokens or not under_way) else None
                if piece is not None:
                    done = sum(answers.asked.outstanding(sampling) for answers in ready)
                    ready, told = [], Piece(len(piece.index), size, done)
                    size = 0
                    yield piece
                    yield told
        finally:
            if under_way:
                engine.abort_request(list(under_way))

    def more(self, asked: Sequence[Wanted], last: bool) -> None:
        """Further prompts for the `stream` that is being read; after the `last` ones it ends. Called beside it, in another thread."""
        self.inbox.put((asked, last))

    def _rollout(self, ready: Sequence["Answers"]) -> Rollout:
        """What the engine wrote, as flat arrays."""
        tokens: list[int] = []
        log_probs: list[float] = []
        found = [(answers.asked, k, answers.given[k]) for answers in ready for k in range(len(answers.asked.seeds))]
        for asked, _, completion in found:
            ids = list(completion.token_ids)
            tokens += [*asked.prompt, *ids]
            log_probs += [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
        return Rollout(
            np.array([asked.first + k for asked, k, _ in found], np.int64),
            np.array([len(asked.prompt) for asked, _, _ in found], np.int64),
            np.array([len(completion.token_ids) for _, _, completion in found], np.int64),
            np.array(tokens, np.int32),
            np.array([completion.finish_reason == "stop" for _, _, completion in found]),
            np.array(log_probs, np.float32),
            self.version,
        )

    def takes(self) -> tuple[str, str]:
        """How weights come, and the dtype in which they are kept."""
        return self.transport, str(self.llm.model_config.dtype).removeprefix("torch.")

    def open_transport(self, init_info: dict[str, Any]) -> None:
        """What the transport's backend asks for, once, before the first update."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """From here to `finish_weight_update` the engine's weights are neither the old nor the new ones."""
        self.llm.start_weight_update()

    def update_weights(self, bucket: Sequence[Spec], *carried: dict[str, Any]) -> None:
        """Take over one bucket of the policy's weights; `carried` is what its ranks' `send` returned, where the transport needs that."""
        info: dict[str, Any] = {
            "names": [spec.name for spec in bucket],
            "dtype_names": [spec.dtype for spec in bucket],
            "shapes": [list(spec.shape) for spec in bucket],
        }
        for part in carried:
            for key, value in part.items():
                info[key] = {**info.get(key, {}), **value} if isinstance(value, dict) else value  # every rank has handles of its GPU
        self.llm.update_weights({"update_info": info})

    def finish_weight_update(self, version: str) -> str:
        """The weights are whole and called `version`; forget everything cached under the old ones."""
        self.llm.finish_weight_update(version)
        self._now(version)
        return version

    def _now(self, version: str) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset: a request is still running")
        self.version = version

    def load_adapter(self, version: str, adapter: tuple[Any, dict[str, np.ndarray]]) -> int:
        """Answer with this adapter of the weights (peft's configuration and matrices) from here on; returns its bytes.

        vLLM opens folders only: it gets one in memory, for as long as it reads. Every adapter has a number of its own, since vLLM takes
        one that it knows for the one that it has.
        """
        from vllm.lora.request import LoRARequest

        config, weights = adapter
        before, self.adapters = self.adapter, self.adapters + 1
        with TemporaryDirectory(prefix="adapter-", dir=MEMORY if MEMORY.is_dir() else None) as folder:
            write_adapter(config, {name: torch.from_numpy(array.copy()) for name, array in weights.items()}, Path(folder))
            self.adapter = LoRARequest(version, self.adapters, folder)
            self.llm.llm_engine.add_lora(self.adapter)
        if before is not None:
            self.llm.llm_engine.remove_lora(before.lora_int_id)
        self._now(version)
        return sum(array.nbytes for array in weights.values())

    def fingerprints(self, specs: Sequence[Spec]) -> dict[str, list[Fingerprint]]:
        """Of the weights that the engine multiplies with, see `fingerprints.engine_fingerprints`."""
        found: dict[str, list[Fingerprint]] = self.llm.collective_rpc("fingerprints", args=(list(specs),))[0]
        return found

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if len(prompt) + max_tokens > self.max_tokens:
                raise ValueError(f"prompt {i}: {len(prompt)} + {max_tokens} tokens are more than the engine's {self.max_tokens}")
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise ValueError(f"prompt {i} has an id outside 0..{self.vocab_size - 1}")
