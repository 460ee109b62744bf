"""Seconds to render one example by its number of turns: with the prefix rule checked from the last
special token on, and with every turn's prompt encoded anew.

Run: `python tests/bench/bench_render.py [--model builtin:tiny-base] [--turns 10 20 40 80]`.
"""

import argparse
import time

from step_ray.render import Renderer, Span
from step_ray.training.student import load_tokenizer, resolve_init
from step_ray.types import Message

ROOM = "You are in the middle of a room. Looking quickly around you, you see a desk 1, a shelf 1. "
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin:tiny-base", help="folder, hub id or builtin:")
    parser.add_argument("--turns", type=int, nargs="+", default=[10, 20, 40, 80])
    args = parser.parse_args()
    tokenizer = load_tokenizer(resolve_init(args.model))
    ours, anew = Renderer(tokenizer, 10**6), Renderer(tokenizer, 10**6)
    encoder = anew._encoder

    def encode_anew(part, whole, tokens):
        ids = encoder.encode(part).ids
        return len(ids) if tokens.ids[: len(ids)] == ids else None

    encoder.prefix_length = encode_anew
    for num_turns in args.turns:
        messages = conversation(num_turns)
        seconds = {name: best(r, messages) for name, r in (("ours", ours), ("anew", anew))}
        same = ours.render_example(messages, spans(messages)) == anew.render_example(
            messages, spans(messages)
        )
        print(
            f"{num_turns:4d} turns: {seconds['ours']:.4f} s, every prompt anew"
            f" {seconds['anew']:.4f} s; same example: {same}"
        )


def conversation(num_turns: int) -> list[Message]:
    messages = [Message(role="system", content=ROOM * 4), Message(role="user", content=ROOM * 3)]
    for turn in range(num_turns):
        answer = f"Thought: I look at the shelf {turn} and take it.\nAction: go to shelf {turn}"
        messages.append(Message(role="assistant", content=answer))
        messages.append(Message(role="user", content=f"On the shelf {turn}, you see a mug 1."))
    return messages[:-1]


def spans(messages: list[Message]) -> list[Span]:
    return [Span(message=i) for i, m in enumerate(messages) if m.role == "assistant"]


def best(renderer: Renderer, messages: list[Message]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        renderer.render_example(messages, spans(messages))
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
