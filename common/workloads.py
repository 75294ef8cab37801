"""Deterministic workloads: the same arguments give the same requests, on every machine.

Every generator takes `num_requests` and `seed`; those that write token ids also take `first_id` and `vocab_size`: ids
are drawn from [first_id, vocab_size), which avoids the special tokens at the start of most vocabularies. Unless its
docstring says otherwise, all requests arrive at time 0, are decoded greedily and stop at the end-of-sequence token.
Lengths are in tokens, times in seconds.
"""

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

DEFAULT_FIRST_ID = 64
DEFAULT_VOCAB_SIZE = 4096  # of the shipped tiny models; every larger vocabulary contains it

QUESTIONS = (
    "What is a KV cache?",
    "Why does decoding one token read all the weights?",
    "What happens during prefill?",
    "How does paged attention store keys and values?",
    "What is a block table?",
    "Why is a KV cache block sixteen tokens long?",
    "What is continuous batching?",
    "Why is static batching slow when output lengths differ?",
    "What does the scheduler decide in each step?",
    "What is preemption, and when does it happen?",
    "How can a preempted request continue where it was?",
    "What is chunked prefill?",
    "Why does a long prompt delay the other requests?",
    "What is time to first token?",
    "What is the difference between latency and throughput?",
    "What is inter-token latency?",
    "How does prefix caching work?",
    "When may two requests share a block?",
    "Which block is evicted first from the prefix cache?",
    "What is speculative decoding?",
    "Why does speculative decoding not change the output?",
    "How does a draft model propose tokens?",
    "What is n-gram speculation good for?",
    "What is tensor parallelism?",
    "Why does a row-parallel layer need an all-reduce?",
    "How are attention heads divided between two GPUs?",
    "What is data parallelism in inference?",
    "How does a router choose a replica?",
    "What is a mixture of experts?",
    "What does top-2 routing mean?",
    "Why do experts need an all-to-all exchange?",
    "When is it worth moving the KV cache to CPU memory?",
    "Why are prefill and decode run on different machines?",
    "How is a KV cache sent from one machine to another?",
    "What is weight quantization?",
    "How much quality does int4 quantization lose?",
    "What does FP8 mean?",
    "Why is decoding limited by memory bandwidth?",
    "What does a CUDA graph save?",
    "What is grouped-query attention?",
    "How does temperature change the next token?",
    "What is the difference between top-k and top-p sampling?",
)


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload, with either token ids or chat messages as its prompt.

    arrival_s: seconds after the workload's start. max_tokens: the most tokens to generate; with ignore_eos exactly that
    many. cancel_after_chunks: the client disconnects after this many pieces of content, 0: when the reply begins.
    Raises ValueError for an invalid request.
    """

    request_id: str
    arrival_s: float
    max_tokens: int
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, str]] | None = None
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int | None = None
    cancel_after_chunks: int | None = None

    def __post_init__(self) -> None:
        if bool(self.prompt_token_ids) == bool(self.messages):
            raise ValueError(f"{self.request_id}: give prompt_token_ids or messages, exactly one of them and not empty")
        if self.max_tokens < 1:
            raise ValueError(f"{self.request_id}: max_tokens={self.max_tokens} must be at least 1")
        if self.arrival_s < 0:
            raise ValueError(f"{self.request_id}: arrival_s={self.arrival_s} must not be negative")
        if self.cancel_after_chunks is not None and self.cancel_after_chunks < 0:
            raise ValueError(f"{self.request_id}: cancel_after_chunks={self.cancel_after_chunks} must not be negative")


def short_chat(num_requests: int = 16, seed: int = 0, *, max_tokens: int = 64) -> list[WorkloadRequest]:
    """Questions about LLM inference as one-message chats, shuffled; after len(QUESTIONS) requests they repeat."""
    questions = random.Random(seed).sample(QUESTIONS, k=len(QUESTIONS))
    return [
        WorkloadRequest(
            f"short_chat-{i}", 0.0, max_tokens, messages=[{"role": "user", "content": questions[i % len(questions)]}]
        )
        for i in range(num_requests)
    ]


def long_prompts(
    num_requests: int = 16,
    seed: int = 0,
    *,
    min_prompt_tokens: int = 512,
    max_prompt_tokens: int = 1024,
    max_tokens: int = 32,
    first_id: int = DEFAULT_FIRST_ID,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """Long prompts and short answers: prompt lengths are uniform in [min_prompt_tokens, max_prompt_tokens]."""
    rng = random.Random(seed)
    prompts = [
        random_token_ids(rng, rng.randint(min_prompt_tokens, max_prompt_tokens), first_id, vocab_size)
        for _ in range(num_requests)
    ]
    return _from_token_ids("long_prompts", prompts, [max_tokens] * num_requests)


def shared_prefix(
    num_requests: int = 16,
    seed: int = 0,
    *,
    prefix_tokens: int = 256,
    suffix_tokens: int = 32,
    num_prefixes: int = 1,
    max_tokens: int = 32,
    first_id: int = DEFAULT_FIRST_ID,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """Requests that share a prefix of prefix_tokens tokens, each followed by suffix_tokens tokens of its own.

    With num_prefixes > 1 the requests are divided evenly among the prefixes, in shuffled order, so that round-robin
    routing does not send each prefix to one replica by accident.
    """
    rng = random.Random(seed)
    prefixes = [random_token_ids(rng, prefix_tokens, first_id, vocab_size) for _ in range(num_prefixes)]
    owners = [i % num_prefixes for i in range(num_requests)]
    rng.shuffle(owners)
    prompts = [prefixes[owner] + random_token_ids(rng, suffix_tokens, first_id, vocab_size) for owner in owners]
    return _from_token_ids("shared_prefix", prompts, [max_tokens] * num_requests)


def heavy_tailed(
    num_requests: int = 32,
    seed: int = 0,
    *,
    median_output_tokens: int = 48,
    sigma: float = 1.0,
    min_output_tokens: int = 4,
    max_output_tokens: int = 512,
    first_id: int = DEFAULT_FIRST_ID,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """A few answers are much longer than the rest, so static batches wait for them.

    Output lengths are log-normal, exp(N(ln median_output_tokens, sigma²)), clipped to
    [min_output_tokens, max_output_tokens] and exact (ignore_eos); with sigma 1 one in ten exceeds 3.6 medians.
    Prompt lengths are uniform in [16, 128].
    """
    rng = random.Random(seed)
    prompts = [random_token_ids(rng, rng.randint(16, 128), first_id, vocab_size) for _ in range(num_requests)]
    lengths = [round(median_output_tokens * rng.lognormvariate(0.0, sigma)) for _ in range(num_requests)]
    clipped = [min(max(length, min_output_tokens), max_output_tokens) for length in lengths]
    return _from_token_ids("heavy_tailed", prompts, clipped, ignore_eos=True)


def bursts(
    num_requests: int = 32,
    seed: int = 0,
    *,
    burst_size: int = 8,
    gap_s: float = 2.0,
    max_tokens: int = 32,
    first_id: int = DEFAULT_FIRST_ID,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """burst_size requests at once every gap_s seconds; prompts uniform in [16, 128], max_tokens exact (ignore_eos)."""
    rng = random.Random(seed)
    prompts = [random_token_ids(rng, rng.randint(16, 128), first_id, vocab_size) for _ in range(num_requests)]
    requests = _from_token_ids("bursts", prompts, [max_tokens] * num_requests, ignore_eos=True)
    return with_arrivals(requests, [(i // burst_size) * gap_s for i in range(num_requests)])


def nano_vllm(
    num_requests: int = 256,
    seed: int = 0,
    *,
    min_tokens: int = 100,
    max_input_tokens: int = 1024,
    max_output_tokens: int = 1024,
    first_id: int = DEFAULT_FIRST_ID,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """nano-vllm's published benchmark (its bench.py): prompt and output lengths uniform, temperature 0.6, ignore_eos.

    The random numbers are drawn in bench.py's order, so the defaults give its 142,827 prompt and 133,966 output tokens,
    with the same lengths. Its token ids (0 to 10,000) are folded into [first_id, vocab_size); first_id=0 and
    vocab_size=10_001 keep them unchanged.
    """
    rng = random.Random(seed)
    drawn = [
        [rng.randint(0, 10_000) for _ in range(rng.randint(min_tokens, max_input_tokens))] for _ in range(num_requests)
    ]
    lengths = [rng.randint(min_tokens, max_output_tokens) for _ in range(num_requests)]
    prompts = [[first_id + token_id % (vocab_size - first_id) for token_id in prompt] for prompt in drawn]
    return _from_token_ids("nano_vllm", prompts, lengths, ignore_eos=True, temperature=0.6)


def nano_vllm_cpu(
    num_requests: int = 32,
    seed: int = 0,
    *,
    first_id: int = DEFAULT_FIRST_ID,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
) -> list[WorkloadRequest]:
    """nano_vllm scaled down for a laptop: prompts uniform in [16, 256], outputs in [16, 128]."""
    return nano_vllm(
        num_requests,
        seed,
        min_tokens=16,
        max_input_tokens=256,
        max_output_tokens=128,
        first_id=first_id,
        vocab_size=vocab_size,
    )


WORKLOADS: dict[str, Callable[..., list[WorkloadRequest]]] = {
    generator.__name__: generator
    for generator in (short_chat, long_prompts, shared_prefix, heavy_tailed, bursts, nano_vllm, nano_vllm_cpu)
}


def build_workload(name: str, *, request_rate: float | None = None, **options: int | float) -> list[WorkloadRequest]:
    """Build the workload of that name; with request_rate (requests/s) its arrivals become a Poisson process.

    Raises ValueError for a name that is not in WORKLOADS or an option that the workload does not have.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r} does not exist; choose one of {', '.join(WORKLOADS)}")
    accepted = inspect.signature(WORKLOADS[name]).parameters
    if unknown := sorted(set(options) - set(accepted)):
        raise ValueError(f"workload {name!r} has no option {', '.join(unknown)}; it has {', '.join(accepted)}")
    requests = WORKLOADS[name](**options)
    if request_rate is None:
        return requests
    return with_arrivals(requests, poisson_arrivals(len(requests), request_rate, int(options.get("seed", 0))))


def poisson_arrivals(num_requests: int, requests_per_s: float, seed: int = 0) -> list[float]:
    """Arrival times in seconds, ascending, whose gaps are exponential with mean 1 / requests_per_s.

    Raises ValueError unless requests_per_s is positive.
    """
    if requests_per_s <= 0:
        raise ValueError(f"requests_per_s={requests_per_s} must be positive")
    rng = random.Random(f"arrivals-{seed}")  # separate, so that gaps do not follow the lengths drawn from `seed`
    arrivals, now_s = [], 0.0
    for _ in range(num_requests):
        now_s += rng.expovariate(requests_per_s)
        arrivals.append(now_s)
    return arrivals


def with_arrivals(requests: Sequence[WorkloadRequest], arrivals_s: Sequence[float]) -> list[WorkloadRequest]:
    """The same requests with these arrival times; raises ValueError if the two differ in number."""
    return [replace(request, arrival_s=at_s) for request, at_s in zip(requests, arrivals_s, strict=True)]


def random_token_ids(rng: random.Random, num_tokens: int, first_id: int, vocab_size: int) -> list[int]:
    """num_tokens ids, independent and uniform in [first_id, vocab_size)."""
    return [rng.randrange(first_id, vocab_size) for _ in range(num_tokens)]


def _from_token_ids(
    name: str, prompts: list[list[int]], lengths: list[int], *, ignore_eos: bool = False, temperature: float = 0.0
) -> list[WorkloadRequest]:
    return [
        WorkloadRequest(
            f"{name}-{i}", 0.0, length, prompt_token_ids=prompt, ignore_eos=ignore_eos, temperature=temperature
        )
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
