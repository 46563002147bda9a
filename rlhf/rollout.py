"""The rollout role: vLLM engines that turn prompts into responses, tokens in and tokens out.

    engine = EngineWorker(0, 1, threads=2, model=path, stop=[3], vocab_size=4096, max_tokens=96, seed=0)
    rollout = engine.generate(index=[0, 1], prompts=[[5, 6], [7]], seeds=[1, 2], max_tokens=32, temperature=1.0)

An engine lives in its actor's process (no second process to lose; only with tensor parallelism its workers are processes below
it), is given ids and never text, and validates every id:
one id outside the vocabulary would make vLLM wait for ever.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.groups import Worker
from cluster.hardware import hardware
from rlhf.experience import Rollout

# What an engine's process needs before vLLM is imported.
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the actor: its death is the actor's, seen in 0.2 s
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with the other roles; `auto` would want a NUMA node per process
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ENV = {"TORCHDYNAMO_DISABLE": "1"}  # without a GPU the sampler's first compiled call costs 6 s and gains nothing


def engine_env(on_gpu: bool) -> dict[str, str]:
    return ENGINE_ENV if on_gpu else ENGINE_ENV | CPU_ENV


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
        tensor_parallel: int = 1,
        shares: bool = False,
    ) -> None:
        """Load `model` for sequences of at most `max_tokens` tokens; generation ends at one of the `stop` ids.

        tensor_parallel: over how many GPUs of this actor, or processes without one, each matrix is split.
        shares: the engine's devices are others' too, whenever it sleeps.
        """
        super().__init__(rank, world, threads)
        from vllm import LLM

        from rlhf.weight_sync import BACKEND

        hw = hardware()
        self.stop, self.vocab_size, self.max_tokens = list(stop), vocab_size, max_tokens
        self.version = "initial"
        self.llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            dtype="bfloat16" if hw.is_gpu else "float32",
            enforce_eager=not hw.is_gpu,
            max_model_len=max_tokens,
            max_num_seqs=256,
            seed=seed,
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from, temperature included
            weight_transfer_config={"backend": BACKEND},
            worker_extension_cls="rlhf.weight_sync.WorkerExtension",
            disable_log_stats=True,
            tensor_parallel_size=tensor_parallel,
            # vLLM's Ray executor would ask Ray for GPUs that this actor holds already, and refuses CPUs: processes of its own.
            distributed_executor_backend="mp" if tensor_parallel > 1 else None,
            enable_sleep_mode=shares and hw.is_gpu,
            gpu_memory_utilization=0.8 if shares else 0.9,  # a sleeping role keeps its CUDA context, about 0.5 GB
        )
        self.llm.init_weight_transfer_engine({"init_info": {}})

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
        from vllm import SamplingParams, TokensPrompt

        self._check(prompts, max_tokens)
        params = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_tokens,
                seed=seed,
                logprobs=0,
                stop_token_ids=self.stop,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=list(p)) for p in prompts], params, use_tqdm=False)
        tokens: list[int] = []
        log_probs: list[float] = []
        lengths = []
        for prompt, output in zip(prompts, outputs, strict=True):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            tokens += [*prompt, *ids]
            log_probs += [step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)]
            lengths.append(len(ids))
        return Rollout(
            np.asarray(index, np.int64),
            np.array([len(p) for p in prompts], np.int64),
            np.array(lengths, np.int64),
            np.array(tokens, np.int32),
            np.array([output.outputs[0].finish_reason == "stop" for output in outputs]),
            np.array(log_probs, np.float32),
            self.version,
        )

    def update_weights(self, version: str, *buckets: dict[str, npt.NDArray[Any]]) -> str:
        """Take over the policy's weights (transformers' names) and forget everything cached under the old ones."""
        self.llm.start_weight_update()
        for bucket in buckets:
            self.llm.update_weights({"update_info": {"weights": bucket}})
        self.llm.finish_weight_update(version)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset: a request is still running")
        self.version = version
        return version

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty")
            if len(prompt) + max_tokens > self.max_tokens:
                raise ValueError(f"prompt {i}: {len(prompt)} + {max_tokens} tokens are more than the engine's {self.max_tokens}")
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise ValueError(f"prompt {i} has an id outside 0..{self.vocab_size - 1}")
