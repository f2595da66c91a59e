"""Sentences that ask for reasoning and for a boxed answer, appended to the prompts of samples that `mathverify` scores.

One sentence of each pool, drawn by the caller's generator (arXiv 2505.18129 §3.1). Called by `processing` and by the example's
data builder.
"""

import random

REASONING_SENTENCES = (
    "Let's think step by step.",
    "Think about the problem step by step before you answer.",
    "Work through the question one step at a time.",
    "Reason carefully and show each step.",
    "First explain your reasoning, then give the result.",
    "Please solve this step by step.",
    "Break the problem into steps and go through them in order.",
    "Take your time and reason through every step.",
    "Write down the steps that lead to your answer.",
    "Explain how you arrive at the answer, step by step.",
)

ANSWER_SENTENCES = (
    r"Place the answer in \boxed{}.",
    r"Put your final answer inside \boxed{}.",
    r"Give the final answer in \boxed{}.",
    r"Write the result within \boxed{}.",
    r"The final answer must be enclosed in \boxed{}.",
    r"State your answer as \boxed{}.",
    r"End with the answer in \boxed{}.",
    r"Present the final result inside \boxed{}.",
    r"Your final answer should appear in \boxed{}.",
    r"Finish by writing the answer in \boxed{}.",
)


def append_cot(text: str, rng: random.Random) -> str:
    """`text` followed by one reasoning sentence and one answer sentence, separated by single spaces."""
    return f"{text.rstrip()} {rng.choice(REASONING_SENTENCES)} {rng.choice(ANSWER_SENTENCES)}"
