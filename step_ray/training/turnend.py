"""What ends a turn of the agent: the one place that knows.

Takes a tokenizer with a chat template, gives the token that the template writes behind an assistant
message, and all tokens at which generation stops. Training examples (render.py), the served agent
(generation.py) and exported model folders (student.py) ask here, so they cannot disagree.
"""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from step_ray.errors import TemplateError, boundary

_ANSWER = "\ue000"
"""Stands for the agent's message; a private-use character, which no template writes itself."""


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends every turn of the agent: trained there, and generation stops there.

    It is the first added token that the template writes behind the message: Llama 2 `</s>`, Llama 3
    `<|eot_id|>` (not its EOS, `<|end_of_text|>`), ChatML and Qwen `<|im_end|>`. Whether the token
    is marked as special makes no difference.

    Raises:
        TemplateError: the template refuses a question and an answer, or writes no such token.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    with boundary(TemplateError, "chat template: it refuses the conversation"):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    ids = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    names = sorted(filter(None, ids), key=len, reverse=True)
    behind = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
    found = re.search("|".join(map(re.escape, names)), behind) if names else None
    if found is None:
        raise TemplateError(
            f"chat template of {tokenizer.name_or_path!r}: it writes no control token behind an"
            " answer, so that generation would never stop; set student.chat_template to one that"
            " ends each turn with the tokenizer's EOS"
        )
    return ids[found[0]]


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any = None) -> tuple[int, ...]:
    """All ids at which generation stops: the end of the turn first, then what else ends a text.

    Args:
        tokenizer: of the served model.
        generation_config: the model's, whose own stop ids are kept; None: it has none.

    Raises:
        TemplateError: see `end_of_turn`.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    known = [*listed] if isinstance(listed, list | tuple) else [listed]
    ids = [end_of_turn(tokenizer), tokenizer.eos_token_id, *known]
    return tuple(dict.fromkeys(int(id_) for id_ in ids if id_ is not None))
