"""What `benchmarks.reasoning` asks of an answer to letter_counting: `ppo.reward_function: benchmarks/counting.py:aloud`.

The number alone says little: it is 1 for 63 % of the questions of 3 and 4 words, so that a model is right without counting.
"""

from data.reasoning import count_aloud


def aloud(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
    """1.0 where every letter is counted as it comes and the number is right, else 0.0."""
    return [float(response.strip() == count_aloud(prompt)) for prompt, response in zip(prompts, responses, strict=True)]
