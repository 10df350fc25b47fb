"""Rows in the schema of the data sets in Chinese and Japanese, and what is read from them."""

from __future__ import annotations

from typing import Any

from format_rows import user

from rlhf.data.records import Pair


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


CHINESE_JAPANESE: dict[str, list[tuple[dict[str, Any], Pair | str]]] = {
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
}
