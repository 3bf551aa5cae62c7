"""Conversations as tokens: what the policy wrote is what its messages say, whatever a template adds or takes."""

import json

import pytest
from transformers import AutoTokenizer

from critic_train.convert.chat import Retokenizer, UnusableError, messages_of

ADDS = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}times times {% endif %}{{ m.content }} "
    "{% if m.role == 'assistant' %}</s> 0 {% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
"""Puts an empty block before what the assistant says."""
OPENS = (
    "{% for m in messages %}{{ m.role }} : {% if '</think>' in m.content %}{{ m.content.split('</think>')[1] }}"
    "{% else %}{{ m.content }}{% endif %} {% if m.role == 'assistant' %}</s> 0 {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : <think>\n{% endif %}"
)
"""Opens thinking for the policy, and takes it out of what it shows."""
TELLS = (
    "{% for m in messages %}{{ m.role }} : {% if m.reasoning_content %}{{ m.reasoning_content }} , {% endif %}"
    "{{ m.content }} {% for c in m.tool_calls or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }} "
    "{% endfor %}{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
"""Shows thinking and tool calls."""


@pytest.fixture
def made(tokenizer, tmp_path):
    def make(template):
        changed = AutoTokenizer.from_pretrained(tokenizer)
        changed.chat_template = template
        changed.save_pretrained(tmp_path / "t")
        return Retokenizer(tmp_path / "t")

    return make


def policy(retokenizer, messages, **options):
    ids, mask = retokenizer.chat(messages_of(messages), **options)
    return retokenizer.shown([i for i, one in zip(ids, mask, strict=True) if one])


def talk(*said):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], **(m if isinstance(m, dict) else {"content": m})} for i, m in enumerate(said)]


def test_what_a_template_adds_is_not_the_policys(made):
    assert policy(made(ADDS), talk("say p", "p is said")) == "p is said </s>"


def test_thinking_that_a_template_opens_stands_in_the_prompt(made):
    retokenizer = made(OPENS)
    # The words of thinking are not in the small vocabulary; what is behind them is.
    assert policy(retokenizer, talk("say p", "<think>\nq </think> p is said")).endswith("p is said </s>")
    with pytest.raises(UnusableError, match="no thinking, where the chat template opens it"):
        policy(retokenizer, talk("say p", "p is said"))


def test_thinking_and_calls_are_the_policys_where_the_template_shows_them(made):
    call = {"id": "c", "function": {"name": "times", "arguments": json.dumps({"p": "q"})}}
    assert (
        policy(made(TELLS), talk("say p", {"content": "p", "reasoning_content": "q is said"})) == "q is said , p </s>"
    )
    assert policy(made(TELLS), talk("say p", {"content": None, "tool_calls": [call]})).startswith("times ")


def test_a_turn_of_the_prompt_is_not_the_policys(made):
    messages = talk("say p", "p", "say q", "q is said")
    assert policy(made(ADDS.replace("times times ", "")), messages) == "p </s> q is said </s>"
    assert policy(made(ADDS.replace("times times ", "")), messages, first=3) == "q is said </s>"


def test_a_template_that_rewrites_earlier_turns_is_refused(made):
    with pytest.raises(UnusableError, match="rewrites earlier turns"):
        policy(made(ADDS), talk("say p", "p", "say q", "q is said"))


def test_a_template_that_leaves_out_others_is_refused(made):
    only_users = "{% for m in messages if m.role != 'system' %}{{ m.role }} : {{ m.content }} {% endfor %}"
    with pytest.raises(UnusableError, match="leaves out what the system said"):
        policy(made(only_users), [{"role": "system", "content": "times"}, *talk("say p", "p")])


def test_a_prompt_that_begins_with_the_special_token_gets_no_second(tokenizer):
    retokenizer = Retokenizer(tokenizer)
    assert retokenizer.pair("say p", "p")[0][:2] == [1, 4]
    assert retokenizer.pair("<s> say p", "p")[0][:2] == [1, 4]


def test_roles_and_contents_of_other_formats():
    value = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "observation", "value": "c"}]
    assert [(m["role"], m["content"]) for m in messages_of(value)] == [("user", "a"), ("assistant", "b"), ("tool", "c")]
    assert messages_of([{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}])[0]["content"] == "ab"
    for odd in ([], "text", [{"content": "a"}], [{"role": "assistant", "content": None}]):
        with pytest.raises(UnusableError):
            messages_of(odd)
