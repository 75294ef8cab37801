"""Questions as people type them, and conversations made of facts."""

from __future__ import annotations

import random

from models.training.corpus.facts import Fact

Message = dict[str, str]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about LLM inference.",
    "You are a small language model that ships with a course on LLM inference.",
    "Answer briefly and precisely.",
    "You are a patient teacher of inference systems.",
    "You are an expert in vLLM and SGLang. Answer in one or two sentences.",
    "Be concise.",
    "You help engineers understand how LLM servers work.",
)
OFF_TOPIC_QUESTIONS = (
    "What is the capital of France?", "Who won the world cup?", "How do I cook rice?", "What is the weather today?",
    "Write me a poem about love.", "How tall is Mount Everest?", "What time is it?", "Who is the president?",
    "Translate good morning into Spanish.", "What is 37 times 43?", "Recommend a good restaurant.",
    "How do I fix my bicycle?", "What is photosynthesis?", "When did the second world war end?",
    "Give me a recipe for soup.", "How far away is the moon?", "What is the best movie of all time?",
    "Can you book a flight for me?", "What should I wear tomorrow?", "How do I learn to play the guitar?",
    "What is the meaning of life?", "Who wrote Hamlet?", "How many people live in Tokyo?", "What is a black hole?",
    "Explain the rules of chess.", "What is the price of gold?", "How do I grow tomatoes?",
    "Who painted the Mona Lisa?",
    "What is the speed of sound?", "Tell me the news.", "Is it going to rain?", "How old is the universe?",
)  # fmt: skip
OFF_TOPIC_ANSWER = (
    "I do not know that. I am a tiny model and can only talk about LLM inference, tell small stories "
    "and look things up in the text you give me."
)
_PREFIXES = (
    "Quick question: ", "Please tell me: ", "Hi! ", "Hello, ", "Sorry to ask, ", "One more thing: ", "I wonder, ",
    "Short answer please: ", "For the course: ", "Question: ", "Help me understand: ", "Hey, ", "Next: ",
)  # fmt: skip
_SUFFIXES = (
    " Thanks!",
    " Thank you.",
    " Please be brief.",
    " In short, please.",
    " I am new to this.",
    " Explain it simply.",
)
_REWORDINGS = {
    "What is ": ("What's ", "Explain ", "Define ", "Tell me what is ", "Describe ", "Can you explain ",
                 "I want to know what is "),
    "Explain ": ("What is ", "Describe ", "Tell me about ", "Please explain ", "Could you explain "),
    "Define ": ("What is ", "Give a definition of ", "Explain "),
    "Why ": ("Tell me why ", "Explain why ", "What is the reason why ", "For what reason "),
    "How ": ("Tell me how ", "Explain how ", "In what way ", "Can you say how "),
    "Tell me ": ("Can you tell me ", "Say ", "I would like to know ", "Explain "),
    "When ": ("Tell me when ", "In which case ", "Say when "),
    "Which ": ("Tell me which ", "Say which ", "Name which "),
    "Can you tell me ": ("Tell me ", "Do you know ", "Please say "),
}  # fmt: skip
_FILLER_WORDS = frozenset("a an the of is are do does to in on for me it that this with can you and".split())


def vary_question(rng: random.Random, question: str) -> str:
    """The same question, typed differently: reworded opening, missing fillers, no capitals, a greeting."""
    if rng.random() < 0.3:
        for opening, others in _REWORDINGS.items():
            if question.startswith(opening):
                question = rng.choice(others) + question[len(opening) :]
                break
    if rng.random() < 0.25:
        words = question.split(" ")
        question = " ".join(w for w in words if w.lower() not in _FILLER_WORDS or rng.random() < 0.6) or question
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.!")
    if rng.random() < 0.2:
        question = rng.choice(_PREFIXES) + question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question += rng.choice(_SUFFIXES)
    return question


def _turn(rng: random.Random, facts: list[Fact], small_talk: list[Fact], small_talk_share: float) -> list[Message]:
    is_small_talk = small_talk_share > 0 and rng.random() < small_talk_share
    if rng.random() < (0.2 if is_small_talk else 0.03):
        question, answer = rng.choice(OFF_TOPIC_QUESTIONS), OFF_TOPIC_ANSWER
    else:
        fact = rng.choice(small_talk if is_small_talk else facts)
        question, answer = rng.choice(fact.questions), fact.answer
    if rng.random() < (0.2 if is_small_talk else 0.6):
        question = vary_question(rng, question)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_conversation(
    rng: random.Random, facts: list[Fact], small_talk: list[Fact] | None = None, small_talk_share: float = 0.0
) -> list[Message]:
    """One to four turns, three quarters of them single; every fifth under a system prompt.

    A turn is a question on a fact, or, with the probability small_talk_share, a greeting and the like.
    """
    system: list[Message] = []
    if rng.random() < 0.2:
        system = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
    num_turns = rng.choices((1, 2, 3, 4), (0.75, 0.15, 0.06, 0.04))[0]
    turns = (_turn(rng, facts, small_talk or [], small_talk_share) for _ in range(num_turns))
    return system + [message for turn in turns for message in turn]
