"""A reward function as a user writes it: `ppo.reward_function: benchmarks/letter.py:share`."""


def share(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
    """The share of the letter that is asked for among all of the response."""
    return [response.count(answer or "x") / max(1, len(response)) for response, answer in zip(responses, answers, strict=True)]
