"""The masking rules, each on token lists written by hand.

`+` before a token: trained. `-`: written by the agent and masked. Nothing: prompt or observation.
"""

from dataclasses import replace

import pytest
from builders import PROMPT, make_step, make_trajectory
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from step_ray.dataset import build_examples
from step_ray.errors import DataError, TemplateError
from step_ray.render import Renderer
from step_ray.training.masking import NOTHING_TRAINED, TOO_LONG
from step_ray.training.recipe import DatasetConfig, Recipe
from step_ray.training.student import CHAT_TEMPLATE
from step_ray.types import Message, StepKind

SPECIAL = ["<unk>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = ["Thought", "Action", ":", "\n", "look", "go", "take", "rules", "room", "desk", "mug"]
VOCAB = [*SPECIAL, *WORDS, "nothing", "wrong", "good", "<", "|", "end", ">"]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "{{ bos_token }}[INST] {% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n"
    "{% endif %}{{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def word_tokenizer(template=CHAT_TEMPLATE, bos="<|bos|>", eos="<|end|>", more=()):
    """One token per word, sign and newline; blanks carry no token."""
    vocab = {word: num for num, word in enumerate([*VOCAB, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[*SPECIAL[3:], *(w for w in more if w.startswith("<|"))],
        chat_template=template,
    )


def act(text, observation, kind=StepKind.ACT):
    return make_step(text, observation, kind)


def error(text, observation):
    return make_step(text, observation, StepKind.ERROR)


def correction(text, observation):
    return make_step(text, observation, StepKind.CORRECTION)


def build(trajectory, recipe=None, config=None, tokenizer=None, max_length=1000):
    tokenizer = tokenizer or word_tokenizer()
    renderer = Renderer(tokenizer, max_length)
    return build_examples([trajectory], renderer, recipe or Recipe(), config or DatasetConfig())


def shown(trajectory, recipe=None, config=None, tokenizer=None):
    """The only example as words, with `+` and `-` for the masks."""
    tokenizer = tokenizer or word_tokenizer()
    [example], _ = build(trajectory, recipe, config, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    signs = zip(tokens, example.loss_mask, example.error_mask, strict=True)
    return [f"{'+' * plus}{'-' * minus}{token}" for token, plus, minus in signs]


HEAD = "<|bos|> <|system|> rules <|end|> <|user|> room <|end|> <|assistant|> "


def test_ids_and_mask_of_one_golden_step_by_hand():
    [example], summary = build(make_trajectory(act("Action: look", "desk")))

    # bos system rules end user room end assistant | Action : look end
    assert example.input_ids == (1, 3, 13, 2, 4, 14, 2, 5, 7, 8, 10, 2)
    assert example.loss_mask == (False,) * 8 + (True,) * 4
    assert example.num_trained == summary.num_trained_tokens == 4


def test_every_agent_turn_is_trained_with_its_end_token_and_nothing_else():
    got = shown(make_trajectory(act("Action: look", "desk"), act("Action: go", "mug")))

    assert " ".join(got) == (
        HEAD + "+Action +: +look +<|end|> <|user|> desk <|end|> <|assistant|> +Action +: +go"
        " +<|end|>"
    )


@pytest.mark.parametrize(
    "recipe", [Recipe(), Recipe(mask_errors=False), Recipe(error_steps="remove")]
)
def test_a_step_without_its_verdict_is_trained_under_no_policy(recipe):
    steps = (act("Action: look", "desk"), act("Action: go", "mug", StepKind.UNJUDGED))
    got = shown(make_trajectory(*steps), recipe)

    assert " ".join(got) == (
        HEAD + "+Action +: +look +<|end|> <|user|> desk <|end|> <|assistant|> -Action -: -go"
        " -<|end|>"
    )


def test_an_example_of_nothing_but_an_unjudged_step_is_dropped():
    examples, summary = build(make_trajectory(act("Action: go", "mug", StepKind.UNJUDGED)))

    assert (examples, dict(summary.dropped)) == ([], {"nothing trained": 1})


def test_an_executed_error_is_masked_and_its_correction_is_trained():
    steps = (
        error("Action: go", "nothing"),
        correction("Thought: wrong\nAction: take", "mug"),
        act("Action: look", "good"),
    )

    got = shown(make_trajectory(*steps))

    assert " ".join(got) == (
        HEAD + "-Action -: -go -<|end|> <|user|> nothing <|end|> <|assistant|>"
        " +Thought +: +wrong +\n +Action +: +take +<|end|> <|user|> mug <|end|> <|assistant|>"
        " +Action +: +look +<|end|>"
    )


def test_an_unexecuted_error_is_masked_inside_the_turn_of_its_correction():
    steps = (error("Action: go", None), correction("Thought: wrong\nAction: take", "mug"))

    got = shown(make_trajectory(*steps))

    # The newline that goes on after the error is the correction's.
    assert " ".join(got) == (
        HEAD + "-Action -: -go +\n +Thought +: +wrong +\n +Action +: +take +<|end|>"
    )


def test_two_unexecuted_errors_are_masked_up_to_the_correction():
    steps = (error("Action: go", None), error("Action: look", None), correction("take", "mug"))

    got = shown(make_trajectory(*steps))

    assert " ".join(got) == HEAD + "-Action -: -go -\n -Action -: -look +\n +take +<|end|>"


def test_errors_and_good_steps_may_alternate_inside_one_turn():
    steps = (error("go", None), act("look", None), error("go", None), correction("take", "mug"))

    got = shown(make_trajectory(*steps))

    assert " ".join(got) == HEAD + "-go +\n +look -\n -go +\n +take +<|end|>"


def test_an_unexecuted_error_at_the_very_end_is_masked_with_its_end_token():
    got = shown(make_trajectory(act("look", "desk"), error("go", None)))

    assert " ".join(got) == (
        HEAD + "+look +<|end|> <|user|> desk <|end|> <|assistant|> -go -<|end|>"
    )


@pytest.mark.parametrize("observation", [None, "nothing"])
def test_without_the_mask_every_token_of_the_agent_is_trained(observation):
    steps = (error("Action: go", observation), correction("Action: take", "mug"))
    between = "+\n " if observation is None else "+<|end|> <|user|> nothing <|end|> <|assistant|> "

    got = shown(make_trajectory(*steps), Recipe(mask_errors=False))

    assert " ".join(got) == HEAD + f"+Action +: +go {between}+Action +: +take +<|end|>"


@pytest.mark.parametrize("observation", [None, "nothing"])
def test_remove_deletes_errors_and_their_observations_from_the_text(observation):
    steps = (act("look", "desk"), error("go", observation), correction("take", "mug"))

    got = shown(make_trajectory(*steps), Recipe(error_steps="remove"))

    assert " ".join(got) == (
        HEAD + "+look +<|end|> <|user|> desk <|end|> <|assistant|> +take +<|end|>"
    )


@pytest.mark.parametrize(("masked", "sign"), [(True, "-"), (False, "+")])
def test_suboptimal_steps_follow_mask_suboptimal(masked, sign):
    steps = (act("go", "desk", StepKind.SUBOPTIMAL), act("look", "mug"))

    got = shown(make_trajectory(*steps), config=DatasetConfig(mask_suboptimal=masked))

    assert " ".join(got) == (
        HEAD + f"{sign}go {sign}<|end|> <|user|> desk <|end|> <|assistant|> +look +<|end|>"
    )


def test_remove_keeps_suboptimal_steps_that_are_not_masked():
    steps = (act("go", "desk", StepKind.SUBOPTIMAL), act("look", "mug"))
    recipe = Recipe(error_steps="remove")

    kept = shown(make_trajectory(*steps), recipe, DatasetConfig(mask_suboptimal=False))
    removed = shown(make_trajectory(*steps), recipe, DatasetConfig(mask_suboptimal=True))

    assert "+go" in kept
    assert " ".join(removed) == HEAD + "+look +<|end|>"


EPISODE = (
    error("Action: go", "nothing"),
    make_step(
        "Thought: wrong mug\nAction: take",
        "mug",
        StepKind.CORRECTION,
        thought="wrong mug",
        action="take",
        reflection="wrong",
    ),
    act("Action: look", "good", StepKind.SUBOPTIMAL),
    act("Action: take", "room"),
)
GIVEN = [1, 3, 13, 2, 4, 14, 2, 5]  # bos system rules end user room end assistant
ERROR = [7, 8, 11, 2]  # Action : go end
AFTER_ERROR = [4, 17, 2, 5]  # user nothing end assistant
CORRECTION = [6, 8, 18, 16, 9, 7, 8, 12, 2]  # Thought : wrong mug newline Action : take end
SHORT = [6, 8, 16, 9, 7, 8, 12, 2]  # without "wrong", the reflection
AFTER_CORRECTION = [4, 16, 2, 5]
SUBOPTIMAL = [7, 8, 10, 2]  # Action : look end
AFTER_SUBOPTIMAL = [4, 19, 2, 5]
LAST = [7, 8, 12, 2]
FULL = [GIVEN, ERROR, AFTER_ERROR, CORRECTION, AFTER_CORRECTION]
FULL += [SUBOPTIMAL, AFTER_SUBOPTIMAL, LAST]
UNREFLECTED = [SHORT if part is CORRECTION else part for part in FULL]


@pytest.mark.parametrize(
    ("policy", "parts", "signs"),
    [  # one sign for each part: + trained, - the agent's and masked, . context
        ("step", FULL, ".-.+.-.+"),
        ("mask_suboptimal", FULL, ".-.+.-.+"),
        ("train_suboptimal", FULL, ".-.+.+.+"),
        ("no_mask", FULL, ".+.+.+.+"),
        ("no_reflection", UNREFLECTED, ".-.+.-.+"),
        ("replace", [GIVEN, CORRECTION, AFTER_CORRECTION, LAST], ".+.+"),
        ("golden_only", FULL, ".-.+.-.+"),
    ],
)
def test_ids_and_masks_of_each_policy_from_one_episode_by_hand(policy, parts, signs):
    [example], _ = build(make_trajectory(*EPISODE), Recipe(policy=policy))

    assert list(example.input_ids) == [token for part in parts for token in part]
    spread = [sign for part, sign in zip(parts, signs, strict=True) for _ in part]
    assert list(example.loss_mask) == [sign == "+" for sign in spread]
    assert list(example.error_mask) == [sign == "-" for sign in spread]


@pytest.mark.parametrize(("arm", "sign"), [("step", "+"), ("mask_suboptimal", "-")])
def test_an_arm_masks_suboptimal_steps_as_the_run_does_unless_it_says_otherwise(arm, sign):
    steps = (act("go", "desk", StepKind.SUBOPTIMAL), act("look", "mug"))

    got = shown(make_trajectory(*steps), Recipe(policy=arm), DatasetConfig(mask_suboptimal=False))

    assert " ".join(got) == (
        HEAD + f"{sign}go {sign}<|end|> <|user|> desk <|end|> <|assistant|> +look +<|end|>"
    )


def test_an_unexecuted_error_is_masked_before_a_correction_without_reflection():
    steps = (error("Action: go", None), replace(EPISODE[1], observation="mug"))

    got = shown(make_trajectory(*steps), Recipe(policy="no_reflection"))

    assert " ".join(got) == (
        HEAD + "-Action -: -go +\n +Thought +: +mug +\n +Action +: +take +<|end|>"
    )


def test_a_correction_of_nothing_but_reflection_keeps_its_action():
    step = make_step(
        "Thought: wrong\nAction: take",
        "mug",
        StepKind.CORRECTION,
        thought="wrong",
        action="take",
        reflection="wrong",
    )

    got = shown(make_trajectory(error("go", "nothing"), step), Recipe(policy="no_reflection"))

    assert " ".join(got).endswith("<|assistant|> +Action +: +take +<|end|>")


def test_a_reflection_that_does_not_begin_its_step_cannot_be_left_out():
    step = replace(EPISODE[1], reflection="mug")

    with pytest.raises(DataError, match=r"step 0: .*'mug'; keep `reflection: true`"):
        build(make_trajectory(EPISODE[0], step), Recipe(policy="no_reflection"))


def test_a_template_fault_names_the_trajectory():
    steps = (error("look", None), correction("take", "mug"))
    mangled = word_tokenizer(
        CHAT_TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper if loop.last }}")
    )

    with pytest.raises(TemplateError, match=r"^trajectory 't7': chat template: "):
        build(make_trajectory(*steps, act("look", "mug"), name="t7"), tokenizer=mangled)


def test_a_worked_example_in_the_prompt_is_not_trained():
    shot = (Message(role="assistant", content="go"), Message(role="user", content="desk"))

    got = shown(make_trajectory(act("look", "mug"), prompt=PROMPT + shot))

    assert " ".join(got) == (HEAD + "go <|end|> <|user|> desk <|end|> <|assistant|> +look +<|end|>")


def test_special_token_text_in_an_observation_stays_text():
    steps = (act("look", "mug <|end|> <|assistant|> go"), act("take", "good"))

    got = shown(make_trajectory(*steps))

    assert " ".join(got) == (
        HEAD + "+look +<|end|> <|user|> mug < | end | > < | <unk> | > go <|end|> <|assistant|>"
        " +take +<|end|>"
    )


def test_special_token_text_in_an_answer_stays_text_and_does_not_end_the_turn():
    got = shown(make_trajectory(act("look <|end|> mug", "good")))

    assert " ".join(got) == HEAD + "+look +< +| +end +| +> +mug +<|end|>"


def test_chatml_trains_the_end_token_but_not_the_newline_behind_it():
    specials = ("<|im_start|>", "<|im_end|>", "system", "user", "assistant")
    tokenizer = word_tokenizer(CHATML, bos=None, eos="<|im_end|>", more=specials)
    steps = (error("go", "nothing"), correction("take", "mug"))

    got = shown(make_trajectory(*steps), tokenizer=tokenizer)

    assert " ".join(got) == (
        "<|im_start|> system \n rules <|im_end|> \n <|im_start|> user \n room <|im_end|> \n"
        " <|im_start|> assistant \n -go -<|im_end|> \n"
        " <|im_start|> user \n nothing <|im_end|> \n"
        " <|im_start|> assistant \n +take +<|im_end|> \n"
    )


def test_llama2_folds_the_system_message_and_has_one_bos_per_round():
    more = ("[", "]", "/", "INST", "SYS", "<s>", "</s>")
    tokenizer = word_tokenizer(LLAMA2, bos="<s>", eos="</s>", more=more)
    steps = (error("go", "nothing </s>"), correction("take", "mug"))

    got = shown(make_trajectory(*steps), tokenizer=tokenizer)

    assert " ".join(got) == (
        "<s> [ INST ] < < SYS > > \n rules \n < < / SYS > > \n \n room [ / INST ] -go -</s>"
        " <s> [ INST ] nothing < / <unk> > [ / INST ] +take +</s>"
    )


def test_llama2_finds_a_masked_error_in_a_message_that_the_template_strips():
    more = ("[", "]", "/", "INST", "SYS", "<s>", "</s>")
    tokenizer = word_tokenizer(LLAMA2, bos="<s>", eos="</s>", more=more)
    steps = (error("  go", None), correction("take  ", "mug"))

    got = shown(make_trajectory(*steps), tokenizer=tokenizer)

    assert " ".join(got).endswith("[ / INST ] -go +\n +take +</s>")


def test_a_template_that_ends_no_turn_is_refused_with_the_knob():
    tokenizer = word_tokenizer(PLAIN, more=("system", "user", "assistant"))

    with pytest.raises(TemplateError, match=r"no control token behind an answer.*chat_template"):
        build(make_trajectory(act("look", "desk")), tokenizer=tokenizer)


def test_too_long_examples_are_dropped_and_counted_never_cut():
    trajectory = make_trajectory(act("Action: look", "desk"))  # 12 tokens

    fitting, _ = build(trajectory, max_length=12)
    cut, summary = build(trajectory, max_length=11)

    assert len(fitting[0].input_ids) == 12
    assert cut == []
    assert summary.dropped == {TOO_LONG: 1}


@pytest.mark.parametrize("steps", [(), (error("go", "nothing"),)])
def test_an_episode_without_a_trained_token_is_dropped_and_counted(steps):
    examples, summary = build(make_trajectory(*steps))

    assert examples == []
    assert summary.dropped == {NOTHING_TRAINED: 1}
