"""Rows in the schema of every public data set of conf/data, and what is read from them."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import CONF, composed

from rlhf.config.choices import Format
from rlhf.config.schema import Source
from rlhf.config.validation import check_config
from rlhf.data import formats
from rlhf.data.formats import Skip, check_columns, detect_format, field, read_row, read_text
from rlhf.data.records import Pair, Turn

DATA = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
FOUR = ["rm_static", "full_hh", "synthetic_instruct", "rlhf_reward"]


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def source(format: str | None = None, **fields: Any) -> Source:
    return Source(path="x", format=Format[format] if format else None, **fields)


def read(format: str, row: dict[str, Any], **fields: Any) -> Pair | str:
    """The pair of a row, or why it is left out."""
    try:
        return read_row(row, source(format, **fields))
    except Skip as reason:
        return str(reason)


# --- the sets of conf/data

HH = [
    (
        {
            "prompt": "\n\nHuman: What is the tallest tree? \n\nAssistant:",
            "response": " A redwood.",
            "chosen": " A redwood.",
            "rejected": " An oak.",
        },
        Pair([user("What is the tallest tree?")], "A redwood.", "An oak."),
    ),
    (
        {
            "prompt": (
                "\n\nHuman: Hi\n\nAssistant: Hello! I am the Assistant: ask me.\n\nHuman: How "
                "do I boil an egg?\n\nAssistant:"
            ),
            "response": " Eight minutes.\n\nNo more.",
            "chosen": " Eight minutes.\n\nNo more.",
            "rejected": " Do you mean a hen's egg?",
        },
        Pair(
            [
                user("Hi"),
                assistant("Hello! I am the Assistant: ask me."),
                user("How do I boil an egg?"),
            ],
            "Eight minutes.\n\nNo more.",
            "Do you mean a hen's egg?",
        ),
    ),
    (
        {
            "prompt": "\n\nHuman: Hm?\n\nAssistant:",
            "response": "",
            "chosen": " ",
            "rejected": " What is it?",
        },
        "empty answer",
    ),
]


def webgpt(
    answers: tuple[str, str], scores: tuple[float, float], question: str = "Why is the sky blue?"
) -> dict[str, Any]:
    quotes = {"title": ["Sky (www.example.org)"], "extract": ["Rayleigh scattering ..."]}
    return {
        "question": {"dataset": "eli5", "id": "1abc", "full_text": question},
        **{f"quotes_{i}": quotes for i in (0, 1)},
        **{f"answer_{i}": answer for i, answer in enumerate(answers)},
        **{f"tokens_{i}": {"prefix": [1, 2], "completion": [3]} for i in (0, 1)},
        **{f"score_{i}": score for i, score in enumerate(scores)},
    }


def shp(
    answers: tuple[str, str], scores: tuple[int, int], history: str = "Can I freeze soup?"
) -> dict[str, Any]:
    return {
        "post_id": "q1",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": history,
        "human_ref_A": answers[0],
        "human_ref_B": answers[1],
        "labels": int(scores[0] > scores[1]),
        "score_A": scores[0],
        "score_B": scores[1],
        "score_ratio": max(scores) / min(scores),
    }


def miracl(query: str, positive: list[str], negative: list[str]) -> dict[str, Any]:
    def passages(texts: list[str]) -> list[dict[str, str]]:
        return [{"docid": f"{i}#0", "title": "Wiki", "text": text} for i, text in enumerate(texts)]

    return {
        "query_id": "7#0",
        "query": query,
        "positive_passages": passages(positive),
        "negative_passages": passages(negative),
        "emb": [0.1, 0.2],
    }


def mkqa(queries: dict[str, str], answers: dict[str, list[str | None]]) -> dict[str, Any]:
    return {
        "example_id": "563260143484355911",
        "queries": {"en": "who wrote it", **queries},
        "query": "who wrote it",
        "answers": {
            "en": [{"type": 0, "entity": "Q1", "text": "me", "aliases": []}],
            **{
                lang: [
                    {"type": 0, "entity": "Q1", "text": text, "aliases": ["x"]} for text in texts
                ]
                for lang, texts in answers.items()
            },
        },
    }


def ultrafeedback(
    answers: tuple[str, str], scores: tuple[float, float], prompt: str = "Name a prime."
) -> dict[str, Any]:
    chosen, rejected = (
        [message("user", prompt), message("assistant", answer)] for answer in answers
    )
    return {
        "prompt": prompt,
        "prompt_id": "ab12",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


SETS: dict[str, list[tuple[dict[str, Any], Pair | str]]] = {
    "rm_static": HH,
    "full_hh": HH,
    "anthropic_hh": [
        (
            {
                "chosen": (
                    "\n\nHuman: Is it late?\n\nAssistant: Are you tired?\n\nHuman: Yes\n\n"
                    "Assistant: Then it is."
                ),
                "rejected": (
                    "\n\nHuman: Is it late?\n\nAssistant: Are you tired?\n\nHuman: Yes\n\n"
                    "Assistant: No."
                ),
            },
            Pair(
                [user("Is it late?"), assistant("Are you tired?"), user("Yes")],
                "Then it is.",
                "No.",
            ),
        ),
        (
            {
                "chosen": "\n\nHuman: Is it late?\n\nAssistant: No.",
                "rejected": "\n\nHuman: Is it late?\n\nAssistant:",
            },
            "empty answer",
        ),
        (
            {"chosen": "\n\nHuman: Hello?", "rejected": "\n\nHuman: Hello?\n\nAssistant: Hi."},
            "empty answer",
        ),
    ],
    "synthetic_instruct": [
        (
            {
                "prompt": "What do the words Human: and Assistant: mean here?",
                "chosen": "They are roles.",
                "rejected": "Nothing.",
            },
            Pair(
                [user("What do the words Human: and Assistant: mean here?")],
                "They are roles.",
                "Nothing.",
            ),
        ),
        ({"prompt": "Say yes.", "chosen": "yes", "rejected": " yes\n"}, "chosen equals rejected"),
    ],
    "rlhf_reward": [
        (
            {
                "prompt": (
                    "\n\nHuman: Tell me a tale.\n\nAssistant: Which one?\n\nHuman: A short one.\n\n"
                ),
                "chosen": "Assistant: Once she said: Assistant: I obey. The end.",
                "rejected": "Assistant: No.",
            },
            Pair(
                [user("Tell me a tale."), assistant("Which one?"), user("A short one.")],
                "Once she said: Assistant: I obey. The end.",
                "No.",
            ),
        ),
        (
            {
                "prompt": "Human: Tell me a tale. ",
                "chosen": "Assistant: Once.",
                "rejected": "Assistant:Twice.",
            },
            Pair([user("Tell me a tale.")], "Once.", "Twice."),
        ),
        (
            {"prompt": "\n\nHuman: Hm? ", "chosen": "Assistant: ", "rejected": "Assistant: No."},
            "empty answer",
        ),
    ],
    "webgpt": [
        (
            webgpt(
                ("Air (mostly nitrogen) scatters blue light [1, 2].", "It is not [1][2]."),
                (0.5, -0.5),
            ),
            Pair(
                [user("Why is the sky blue?")],
                "Air (mostly nitrogen) scatters blue light.",
                "It is not.",
            ),
        ),
        (
            webgpt(
                (
                    "Because.",
                    "Blue [sic] light is scattered (more than red)[3]. [4] Thus (see above) blue.",
                ),
                (-0.25, 0.25),
            ),
            Pair(
                [user("Why is the sky blue?")],
                "Blue [sic] light is scattered (more than red). Thus (see above) blue.",
                "Because.",
            ),
        ),
        (webgpt(("One.", "Two."), (0.0, 0.0)), "tie"),
        (webgpt(("", "Two."), (-1.0, 1.0)), "empty answer"),
    ],
    "shp": [
        (
            shp(("Yes (but not with cream) [1].", "No."), (12, 5)),
            Pair([user("Can I freeze soup?")], "Yes (but not with cream) [1].", "No."),
        ),
        (
            shp(("No.", "Yes."), (5, 6), "Can I freeze soup?\n\nHuman: I ask for a friend."),
            Pair([user("Can I freeze soup?\n\nHuman: I ask for a friend.")], "Yes.", "No."),
        ),
    ],
    "sharegpt": [
        (
            {"prompt": "USER: Is a USER: mark a word? ASSISTANT:", "label": "It is not."},
            Pair([user("Is a USER: mark a word?")], "It is not.", None),
        ),
        (
            {
                "prompt": (
                    "USER: Hi\nASSISTANT: Hello, USER!\nUSER: What is an ASSISTANT: mark?\n"
                    "ASSISTANT:"
                ),
                "label": " A word. ",
            },
            Pair(
                [user("Hi"), assistant("Hello, USER!"), user("What is an ASSISTANT: mark?")],
                "A word.",
                None,
            ),
        ),
        (
            {"prompt": "USER: one ASSISTANT: two</s>USER: three ASSISTANT:", "label": "four</s>"},
            Pair([user("one"), assistant("two"), user("three")], "four", None),
        ),
        ({"prompt": "USER: Hi ASSISTANT:", "label": ""}, "empty answer"),
    ],
    "zhihu_kol": [
        (
            {
                "INSTRUCTION": "怎样说服日本人？",
                "RESPONSE": "先听。\n\n再说。",
                "SOURCE": "Zhihu",
                "METADATA": '{"upvotes": "赞同 3"}',
            },
            Pair([user("怎样说服日本人？")], "先听。\n\n再说。", None),
        ),
        (
            {"INSTRUCTION": "为什么？", "RESPONSE": "", "SOURCE": "Zhihu", "METADATA": "{}"},
            "empty answer",
        ),
    ],
    "miracl_zh": [
        (
            miracl("长城多长？", ["两万公里。", "很长。"], ["在中国。", "很高。"]),
            Pair([user("长城多长？")], "两万公里。", "在中国。"),
        ),
        (miracl("长城多长？", ["两万公里。"], []), Pair([user("长城多长？")], "两万公里。", None)),
        (miracl("长城多长？", [], ["在中国。"]), "empty answer"),
    ],
    "miracl_ja": [
        (
            miracl("富士山の高さは？", ["3776メートル。"], ["静岡県。"]),
            Pair([user("富士山の高さは？")], "3776メートル。", "静岡県。"),
        ),
        (
            miracl("富士山の高さは？", ["3776メートル。"], []),
            Pair([user("富士山の高さは？")], "3776メートル。", None),
        ),
    ],
    "hc3_chinese": [
        (
            {
                "question": "什么是熵？",
                "human_answers": ["混乱的量。", "不知道。"],
                "chatgpt_answers": ["熵是……"],
                "source": "baike",
            },
            Pair([user("什么是熵？")], "混乱的量。", None),
        ),
        (
            {
                "question": "什么是熵？",
                "human_answers": [],
                "chatgpt_answers": ["熵是……"],
                "source": "baike",
            },
            "empty answer",
        ),
    ],
    "mkqa_zh": [
        (
            mkqa(
                {"zh_cn": "谁写的？", "ja": "誰が書いた？"}, {"zh_cn": ["我", "你"], "ja": ["私"]}
            ),
            Pair([user("谁写的？")], "我", None),
        ),
        (mkqa({"zh_cn": "谁写的？"}, {"zh_cn": [None]}), "empty answer"),
        (mkqa({"zh_cn": "谁写的？"}, {"zh_cn": []}), "empty answer"),
    ],
    "mkqa_ja": [
        (
            mkqa({"zh_cn": "谁写的？", "ja": "誰が書いた？"}, {"zh_cn": ["我"], "ja": ["私"]}),
            Pair([user("誰が書いた？")], "私", None),
        ),
        (mkqa({"ja": "誰が書いた？"}, {"ja": [None]}), "empty answer"),
    ],
    "jaquad_qg": [
        (
            {
                "answer": "1960年",
                "question": "いつ始まった？",
                "sentence": "大会は1960年に始まった。",
                "paragraph": "大会は1960年に始まった。毎年ある。",
                "sentence_answer": "大会は<hl>1960年<hl>に始まった。",
                "paragraph_answer": "大会は<hl>1960年<hl>に始まった。毎年ある。",
                "paragraph_sentence": "<hl>大会は1960年に始まった。<hl>毎年ある。",
            },
            Pair([user("いつ始まった？")], "大会は1960年に始まった。", None),
        ),
    ],
    "jaquad_qag": [
        (
            {
                "answers": ["1960年", "毎年"],
                "questions": ["いつ始まった？", "どのくらいの頻度？"],
                "paragraph": "大会は1960年に始まった。毎年ある。",
                "questions_answers": (
                    "question: いつ始まった？, answer: 1960年"
                    " | question: どのくらいの頻度？, answer: 毎年"
                ),
            },
            Pair([user("いつ始まった？")], "大会は1960年に始まった。毎年ある。", None),
        ),
    ],
    "ultrafeedback": [
        (ultrafeedback(("7", "8"), (8.5, 2.0)), Pair([user("Name a prime.")], "7", "8")),
        (ultrafeedback(("7", "Seven"), (8.0, 8.0)), "tie"),
        (ultrafeedback(("7", ""), (8.0, 1.0)), "empty answer"),
    ],
}


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_read_from_rows_in_its_schema(name: str) -> None:
    [one] = composed(f"data={name}").data.sources.values()
    for row, expected in SETS[name]:
        check_columns(list(row), one)
        try:
            assert read_row(row, one) == expected
        except Skip as reason:
            assert str(reason) == expected


def test_no_set_of_the_configuration_is_left_untested() -> None:
    assert set(DATA) == {*SETS, "sandbox", "jsonl", "dschat_four", "dschat_six"}


@pytest.mark.parametrize("name", DATA)
def test_every_data_file_composes(name: str) -> None:
    cfg = composed(f"data={name}", *(["data.sources.mine.path=x.jsonl"] if name == "jsonl" else []))
    assert check_config(cfg) == []
    assert all(one.path for one in cfg.data.sources.values())


def test_your_own_file_needs_a_path_only() -> None:
    with pytest.raises(ValueError, match="data.sources.mine.path has no value"):
        composed("data=jsonl")
    cfg = composed(
        "data=jsonl",
        "data.sources.mine.path=a.jsonl",
        "+data.sources.mine.columns={prompt: question, chosen: answers.0}",
    )
    assert cfg.data.sources == {
        "mine": Source(path="a.jsonl", columns={"prompt": "question", "chosen": "answers.0"})
    }


def test_the_mixes_of_deepspeed_chat_are_the_single_files() -> None:
    """What a mix trains on is what its single files say: no two files differ in silence."""
    for mix, names in (
        ("dschat_four", FOUR),
        ("dschat_six", [*FOUR, "webgpt", "shp"]),
        ("[rm_static,webgpt]", ["rm_static", "webgpt"]),
    ):
        single = {name: composed(f"data={name}").data.sources[name] for name in names}
        mixed = composed(f"data={mix}").data.sources
        assert mixed == single and list(mixed) == names


def test_sets_with_one_answer_are_for_sft_only() -> None:
    for name, rows in SETS.items():
        pairs = [expected for _, expected in rows if isinstance(expected, Pair)]
        [one] = composed(f"data={name}").data.sources.values()
        assert one.sft_only == all(pair.rejected is None for pair in pairs), name


# --- formats


CONVERSATION = [user("a"), assistant("b"), user("c")]


@pytest.mark.parametrize(
    "prompt, turns",
    [
        ("  What is it?\n", [user("What is it?")]),
        ("What does\n\nHuman: mean?", [user("What does\n\nHuman: mean?")]),
        ("The USER: asks the ASSISTANT: what?", [user("The USER: asks the ASSISTANT: what?")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", CONVERSATION),
        ("\n\nHuman: quote:\n\nHuman: b\n\nAssistant:", [user("quote:"), user("b")]),
        (
            "\n\nHuman: Is Assistant: a word? Human: Yes? \n\nAssistant:",
            [user("Is Assistant: a word? Human: Yes?")],
        ),
        ("\n\nHuman: Is Assistant: a word?", [user("Is Assistant: a word?")]),
        (
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ",
            [user("a"), assistant("b"), user("c")],
        ),
        (" Human: a b Assistant:", [user("a b")]),
        (" Human: a Assistant: b Human: c Assistant:", [user("a"), assistant("b"), user("c")]),
        (" Human: a\n Assistant: b\n Human: c\n Assistant: ", CONVERSATION),
        ("Human: What is an Assistant: mark?\nAssistant:", [user("What is an Assistant: mark?")]),
        ("USER: the Human: and the Assistant: ASSISTANT:", [user("the Human: and the Assistant:")]),
        ("ASSISTANT: Welcome! USER: Hi ASSISTANT:", [assistant("Welcome!"), user("Hi")]),
        (
            [message("system", " Be brief. "), message("user", " a\n")],
            [Turn("system", "Be brief."), user("a")],
        ),
        (
            [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            CONVERSATION,
        ),
    ],
)
def test_prompts(prompt: Any, turns: list[Turn]) -> None:
    assert read("prompt_chosen_rejected", {"prompt": prompt, "chosen": "x"}) == Pair(
        turns, "x", None
    )


@pytest.mark.parametrize(
    "answer, expected",
    [
        (" yes\n", "yes"),
        ("Assistant: yes", "yes"),
        ("I, the Assistant: yes", "I, the Assistant: yes"),
        ("\n\nHuman: I quote", "Human: I quote"),
        ("yes [1] (no)", "yes [1] (no)"),
        ([message("assistant", "yes")], "yes"),
        (
            [
                message("user", "a"),
                message("assistant", "no"),
                message("user", "b"),
                message("assistant", " yes "),
            ],
            "yes",
        ),
        ([message("assistant", "yes"), message("user", "thanks")], "empty answer"),
        ("", "empty answer"),
        (None, "empty answer"),
        ([], "empty answer"),
    ],
)
def test_answers(answer: Any, expected: str) -> None:
    found = read("prompt_chosen_rejected", {"prompt": "a", "chosen": answer, "rejected": "other"})
    assert found == (
        expected if expected == "empty answer" else Pair([user("a")], expected, "other")
    )


def test_a_second_answer_may_be_missing_but_not_empty() -> None:
    row = {"prompt": "a", "chosen": "b"}
    for missing in ({}, {"rejected": None}, {"rejected": []}):
        assert read("prompt_chosen_rejected", row | missing) == Pair([user("a")], "b", None)
    assert read("prompt_chosen_rejected", row | {"rejected": " "}) == "empty answer"
    assert read("prompt_chosen_rejected", row | {"rejected": "b "}) == "chosen equals rejected"


@pytest.mark.parametrize("name", ["response", "completion", "answer", "output"])
def test_the_one_answer_has_several_names(name: str) -> None:
    row = {"prompt": "a", name: "b"}
    assert detect_format(row) == Format.prompt_chosen_rejected
    check_columns(list(row), source("prompt_chosen_rejected"))
    assert read_row(row, source()) == Pair([user("a")], "b", None), (
        "the format is told from the row where none is given"
    )
    assert read_row(row | {"chosen": "c"}, source()).chosen == "c", "its own name comes first"


def test_whole_dialogues_as_strings_and_as_messages() -> None:
    strings = {
        "chosen": "USER: a ASSISTANT: b USER: c ASSISTANT: yes",
        "rejected": "USER: a ASSISTANT: b USER: c ASSISTANT: no",
    }
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    messages = {
        "chosen": [*turns, message("assistant", "yes")],
        "rejected": [*turns, message("assistant", "no")],
    }
    expected = Pair([user("a"), assistant("b"), user("c")], "yes", "no")
    assert read("chosen_rejected", strings) == read("chosen_rejected", messages) == expected
    assert read("chosen_rejected", messages | {"rejected": turns}) == "empty answer"
    assert (
        read("chosen_rejected", messages | {"rejected": messages["chosen"]})
        == "chosen equals rejected"
    )


def scored(a: Any, b: Any) -> dict[str, Any]:
    return {"prompt": "q", "answer_a": "first", "answer_b": "second", "score_a": a, "score_b": b}


@pytest.mark.parametrize(
    "a, b, ratio, expected",
    [
        (1, 2, 1, "second"),
        (2.5, 2, 1, "first"),
        (-1, -2, 1, "first"),
        (2, 2.0, 1, "tie"),
        (0, 0, 2, "tie"),
        (3, 2, 2, "scores too close"),
        (2, 3, 1.5, "second"),
        (4, 2, 2, "first"),
        (0, 1, 9, "second"),
    ],
)
def test_the_higher_score_is_chosen_if_it_is_high_enough(
    a: float, b: float, ratio: float, expected: str
) -> None:
    found = read("scored_answers", scored(a, b), min_score_ratio=ratio)
    assert (found.chosen if isinstance(found, Pair) else found) == expected
    assert isinstance(found, str) or {found.chosen, found.rejected} == {"first", "second"}


def test_the_score_ratio_of_shp_is_a_setting() -> None:
    row = shp(("Yes.", "No."), (12, 8))
    assert read_row(row, composed("data=shp").data.sources["shp"]).chosen == "Yes."
    with pytest.raises(Skip, match="scores too close"):
        read_row(
            row, composed("data=shp", "data.sources.shp.min_score_ratio=2").data.sources["shp"]
        )


def test_marks_of_citations_go_only_where_there_are_quotes() -> None:
    row = scored(2, 1) | {"answer_a": "x[1] is y[2, 3] (z).", "answer_b": "x[1]"}
    assert read("scored_answers", row) == Pair([user("q")], "x[1] is y[2, 3] (z).", "x[1]")
    assert read("scored_answers", row | {"quotes_a": {"title": ["t"]}, "quotes_b": []}) == Pair(
        [user("q")], "x is y (z).", "x[1]"
    )


def test_instructions() -> None:
    row = {"instruction": " Translate. ", "input": " Hallo ", "output": " Hello "}
    assert read("instruction", row) == Pair([user("Translate.\n\nHallo")], "Hello", None)
    for nothing in ("", " ", None):
        assert read("instruction", row | {"input": nothing}) == Pair(
            [user("Translate.")], "Hello", None
        )
    assert read("instruction", {"instruction": "Human: Translate.", "output": "Hello"}) == Pair(
        [user("Human: Translate.")], "Hello", None
    )
    assert read("instruction", row | {"output": " "}) == "empty answer"


def test_conversations() -> None:
    turns = [
        message("system", "Be kind."),
        message("user", "a"),
        message("assistant", "b"),
        message("user", "c"),
    ]
    expected = Pair([Turn("system", "Be kind."), user("a"), assistant("b"), user("c")], "d", None)
    assert read("messages", {"messages": [*turns, message("assistant", " d ")]}) == expected
    assert read("messages", {"messages": [*turns, message("assistant", "")]}) == "empty answer"
    named = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert read("messages", {"conversations": named}) == Pair([user("a")], "b", None)


def test_plain_text_is_read_as_it_is() -> None:
    assert read_text({"text": " a\n\nHuman: b\n"}, source("text")) == " a\n\nHuman: b\n"
    assert read_text({"page": {"body": "a"}}, source("text", columns={"text": "page.body"})) == "a"
    for nothing in ({"text": " \n"}, {"text": None}):
        with pytest.raises(Skip, match="empty text"):
            read_text(nothing, source("text"))
    with pytest.raises(ValueError, match="text is a number, not a string"):
        read_text({"text": 3}, source("text"))


# --- fields, columns


@pytest.mark.parametrize(
    "path, expected",
    [
        ("plain", "x"),
        ("question.full_text", "why"),
        ("passages.1.text", "two"),
        ("answers.0", "a"),
        ("answers", ["a"]),
        ("with.dots", "y"),
        ("passages.7.text", None),
        ("none.0.text", None),
        ("empty.0", None),
        ("empty", None),
        ("question.nothing", None),
        ("nothing", None),
        ("passages.0.text.deeper", "passages.0.text.deeper: a string has no deeper"),
        ("passages.first", "passages.first: a list has no first"),
    ],
)
def test_paths_of_columns(path: str, expected: Any) -> None:
    row = {
        "plain": "x",
        "question": {"full_text": "why", "nothing": None},
        "passages": [{"text": "one"}, {"text": "two"}],
        "answers": ["a"],
        "with.dots": "y",
        "none": None,
        "empty": [],
    }
    try:
        assert field(row, source(columns={"chosen": path}), "chosen") == expected
    except ValueError as error:
        assert str(error) == expected


@pytest.mark.parametrize(
    "columns, expected",
    [
        (["prompt", "response", "chosen", "rejected"], "prompt_chosen_rejected"),
        (["prompt", "chosen"], "prompt_chosen_rejected"),
        (["prompt", "completion"], "prompt_chosen_rejected"),
        (["prompt", "completion", "label"], None),
        (["chosen", "rejected"], "chosen_rejected"),
        (["chosen", "rejected", "score_chosen", "score_rejected", "messages"], "chosen_rejected"),
        (["prompt", "answer_a", "answer_b", "score_a", "score_b"], "scored_answers"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["id", "conversations"], "messages"),
        (["instruction", "output"], "instruction"),
        (["instruction", "input", "output", "text", "prompt"], "instruction"),
        (["text", "meta"], "text"),
        (["prompt"], None),
        (["chosen"], None),
        (["question", "reply"], None),
        ([], None),
    ],
)
def test_formats_are_told_from_the_columns(columns: list[str], expected: str | None) -> None:
    assert detect_format(columns) == (Format[expected] if expected else None)


def test_a_detected_format_has_its_columns() -> None:
    for format, (required, optional) in formats.FIELDS.items():
        if format != Format.sandbox:
            for columns in (required, required + optional):
                assert detect_format(columns) == format
                check_columns(columns, source(format.name))


@pytest.mark.parametrize(
    "columns, one, expected",
    [
        (
            ["prompt", "b"],
            source("prompt_chosen_rejected"),
            "format prompt_chosen_rejected needs the columns chosen; there are prompt, b",
        ),
        (
            ["a"],
            source("instruction"),
            "format instruction needs the columns instruction, output; there are a",
        ),
        (
            ["prompt", "b"],
            source("prompt_chosen_rejected", columns={"chosen": "c.0"}),
            "needs the columns c.0; there are prompt, b",
        ),
        (
            ["prompt", "chosen"],
            source("prompt_chosen_rejected", columns={"rejected": "c"}),
            "needs the columns c; there are prompt, chosen",
        ),
        (
            ["text"],
            source("text", columns={"txt": "text"}),
            "format text has no field txt, only text",
        ),
    ],
)
def test_columns_that_are_missing_are_named_with_those_there_are(
    columns: list[str], one: Source, expected: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_columns(columns, one)
    assert expected in str(error.value)


# --- rows that cannot be read

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    "format, row, expected",
    [
        ("prompt_chosen_rejected", GOOD | {"chosen": 3}, "chosen is a number, not a string"),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": True},
            "chosen is true or false, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"rejected": {"text": "c"}},
            "rejected is an object, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"rejected": float("nan")},
            "rejected is nan, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": {"text": "a"}},
            "prompt is an object, not a string",
        ),
        ("prompt_chosen_rejected", GOOD | {"prompt": b"a"}, "prompt is a bytes, not a string"),
        ("prompt_chosen_rejected", {"prompt": "a"}, "no field chosen"),
        ("prompt_chosen_rejected", {"chosen": "a"}, "no field prompt"),
        ("prompt_chosen_rejected", GOOD | {"prompt": None}, "prompt is empty"),
        ("prompt_chosen_rejected", GOOD | {"prompt": []}, "prompt is empty"),
        ("prompt_chosen_rejected", GOOD | {"prompt": " "}, "the prompt has no user's turn"),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": "\n\nHuman: \n\nAssistant:"},
            "the prompt has no user's turn",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": "Assistant:"},
            "the prompt has no user's turn",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": [message("system", "a")]},
            "the prompt has no user's turn",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": "\n\nHuman: a\n\nAssistant: b"},
            "the prompt ends with the assistant's turn, not with the user's",
        ),
        ("prompt_chosen_rejected", GOOD | {"prompt": ["a"]}, "prompt.0 is a string, not a message"),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": [message("user", None)]},
            "prompt.0 is empty, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message("user", [{"type": "text"}])]},
            "chosen.0 is a list, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message("tool", "x")]},
            "chosen.0: unknown role tool; known are user, human, assistant, gpt, system",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message({}, "x")]},
            "chosen.0: unknown role {}; ",
        ),  # type: ignore[arg-type]
        (
            "chosen_rejected",
            {"chosen": "yes", "rejected": "no"},
            "chosen is not a dialogue: it does not begin with Human: or USER:",
        ),
        ("chosen_rejected", {"chosen": "USER: a ASSISTANT: b"}, "no field rejected"),
        (
            "chosen_rejected",
            {"chosen": "ASSISTANT: b", "rejected": "ASSISTANT: c"},
            "the prompt has no user's turn",
        ),
        (
            "chosen_rejected",
            {"chosen": "USER: a ASSISTANT: b", "rejected": "USER: x ASSISTANT: c"},
            "chosen and rejected differ before the last answer",
        ),
        ("scored_answers", scored("5", 1), "score_a is a string, not a number"),
        ("scored_answers", scored(1, None), "score_b is empty"),
        ("scored_answers", scored(1, True), "score_b is true or false, not a number"),
        ("scored_answers", scored(float("nan"), 1), "score_a is nan, not a number"),
        ("scored_answers", {"prompt": "q"}, "no field answer_a"),
        ("scored_answers", scored(1, 2) | {"answer_b": 7}, "answer_b is a number, not a string"),
        ("instruction", {"instruction": "a"}, "no field output"),
        (
            "instruction",
            {"instruction": "a", "input": 1, "output": "b"},
            "input is a number, not a string",
        ),
        ("instruction", {"instruction": "", "output": "b"}, "the prompt has no user's turn"),
        ("messages", {"messages": "a"}, "messages is a string, not a list of messages"),
        ("messages", {"messages": []}, "messages is empty"),
        (
            "messages",
            {"messages": [message("user", "a")]},
            "the last message is the user's, not the assistant's",
        ),
        ("messages", {"messages": [message("assistant", "a")]}, "the prompt has no user's turn"),
        ("text", {"text": "a"}, "format text has no prompts and answers"),
        (
            None,
            {"question": "a", "reply": "b"},
            "no format fits the columns question, reply: give format and columns",
        ),
    ],
)
def test_rows_that_cannot_be_read_say_why(
    format: str | None, row: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError) as error:
        read_row(row, source(format))
    assert str(error.value).startswith(expected)


def test_a_ratio_of_negative_scores_is_refused() -> None:
    with pytest.raises(
        ValueError, match="scores -1 and 1: min_score_ratio needs scores that are not negative"
    ):
        read_row(scored(-1, 1), source("scored_answers", min_score_ratio=2))
