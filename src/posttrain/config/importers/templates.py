"""Other tools' names for chat templates: ours that render the same, and the models whose own tokenizer carries that format."""

from __future__ import annotations

import re

from posttrain.config.importers.fates import ImportDraft

_QWEN25 = r"qwen2(\.5)?(-coder|-math)?-|qwen1\.5-|qwq"
_QWEN3 = r"qwen3-(?!.*vl)(?!.*base)|qwen3guard|skywork-reward-v2-qwen3"
_LLAMA3 = r"llama-?3(\.\d)?(-\d+b)?.*instruct"
OWN: tuple[tuple[str, str], ...] = (
    (r"llama3|llama3_1|llama3\.1|llama3_2", _LLAMA3),
    (r"llama4", r"llama-4-.*(instruct|linearized)"),
    (r"llama2", r"llama-2-\d+b-chat"),
    (r"qwen_25|qwen25|qwen|qwen2|qwen2_5", _QWEN25),
    (r"qwen3|qwen3_nothink|qwen3_think", _QWEN3),
    (r"qwen3_5|qwen3_5_nothink|qwen3_6|qwen3_6_nothink", r"qwen3\.[56]-(?!.*base)"),
    (r"gemma|gemma2", r"gemma-(1\.1-|2-)?\d+b-it"),
    (r"gemma3|gemma3n", r"gemma-3n?-\w+-it"),
    (r"gemma4|gemma4n?", r"gemma-4-.*it"),
    (r"phi_3|phi3|phi", r"phi-3(\.5)?-.*instruct"),
    (r"phi_35", r"phi-3\.5-.*instruct"),
    (r"phi_4|phi4|phi4_mini", r"phi-4"),
    (r"mistral_v1|mistral_v2v3|mistral_v3_tekken|mistral_v7_tekken|mistral|mistral_small|ministral|ministral3", r"(mi[sx]tral|ministral|magistral|devstral).*(instruct|-it|magistral|devstral|2\d{3})"),
    (r"deepseek_v2|deepseek_v3|deepseek3|deepseek|deepseekr1", r"deepseek-(v2|v2\.5|v3|v3\.1|v3\.2|r1|llm-\d+b-chat|coder)(?!.*base)"),
    (r"falcon_h1", r"falcon-h1-.*instruct"),
    (r"cohere|cohere2|command_a", r"command-|aya-|c4ai"),
    (r"jamba", r"jamba-.*(mini|large|instruct)"),
    (r"exaone4?|exaone", r"exaone"),
    (r"command_a|command_a_rag|command_a_tool_use", r"command-a"),
    (r"granite|granite3|granite4|granitemoe", r"granite-.*instruct|granite-4"),
    (r"glm4|glm4_moe|glm4_5|glm_z1|glmz1|chatglm3|chatglm4", r"glm"),
    (r"gpt|gpt_oss|gpt-oss", r"gpt-oss"),
    (r"smollm|smollm2|smollm3", r"smollm.*(instruct|smollm3-3b)"),
    (r"olmo|olmo2|olmo3", r"olmo.*(instruct|sft|dpo|think)"),
    (r"nemotron.*|nemotron_h", r"nemotron"),
    (r"lfm2?", r"lfm2"),
    (r"internlm2|intern2|intern3|intern_s1", r"internlm.*chat|internlm3.*instruct|intern-s1"),
    (r"yi|yi_coder", r"yi-.*chat"),
    (r"baichuan2?", r"baichuan2?-.*chat"),
    (r"apertus", r"apertus.*instruct"),
    (r"minicpm.*|cpm.*", r"minicpm"),
    (r"seed_oss|seed_coder", r"seed-(oss|coder).*instruct"),
    (r"ernie.*", r"ernie"),
    (r"hunyuan.*", r"hunyuan.*instruct"),
    (r"bailing.*|ling.*", r"ling-|ring-"),
    (r"kimi.*|moonlight", r"kimi|moonlight.*instruct"),
    (r"minimax.*", r"minimax"),
    (r"mimo.*", r"mimo"),
)  # fmt: skip
"""A name, as pattern, and the models that carry the format, as pattern of their name."""
_AXOLOTL = ("alpaca", "chatml", "cohere", "deepseek_v2", "exaone", "falcon_h1", "gemma3", "gemma4", "llama4", "metharme", "mistral_v1", "mistral_v2v3",
            "mistral_v3_tekken", "nemotron_h",
            "phi_3", "phi_35", "qwen3", "qwen_25")  # fmt: skip
_LLAMAFACTORY = ("alpaca", "chatml", "cohere", "deepseek", "deepseek3", "default", "exaone", "falcon_h1", "gemma", "granite3", "granite4", "lfm2", "llama2", "llama2_zh",
                 "llama3", "llama4", "ministral", "mistral", "mistral_small", "olmo", "openchat", "phi", "phi4", "phi4_mini", "qwen", "qwen2_vl", "smollm2", "starchat", "vicuna", "zephyr")  # fmt: skip
BUILT_IN: dict[str, dict[str, str]] = {
    "Axolotl": {"llama3": "llama3", "gemma": "gemma", "aya": "axolotl_cohere", "gemma3n": "axolotl_gemma3", "gemma4_unified": "axolotl_gemma4", "qwen3_5": "axolotl_qwen3",
                **{name: f"axolotl_{name}" for name in _AXOLOTL}},
    "LLaMA-Factory": {
        **dict.fromkeys(("yi", "smollm", "qwen3_nothink", "qwen3_vl_nothink", "qwen3_5_nothink"), "llamafactory_chatml"),
        **dict.fromkeys(("cpm4", "intern_s1"), "llamafactory_falcon_h1"), **dict.fromkeys(("gemma3", "gemma3n"), "llamafactory_gemma"),
        **{name: f"llamafactory_{name}" for name in _LLAMAFACTORY},
    },
}  # fmt: skip
"""Tool → a template by its name there → the one here that renders the same text."""
_ENDS = {
    "<|im_end|>": ("chatml", "lfm2", "phi4", "qwen", "qwen2_vl", "qwen3_nothink", "qwen3_vl_nothink", "qwen3_5_nothink"),
    "<end_of_turn>": ("gemma", "gemma3", "gemma3n"), "<|eot_id|>": ("llama3",), "<|eot|>": ("llama4",), "<|end|>": ("phi", "phi4_mini"),
}  # fmt: skip
EOS = {name: token for token, names in _ENDS.items() for name in names}
"""LLaMA-Factory's templates that give the tokenizer another end of text."""
TOKENIZERS_OWN = ("tokenizer_default", "default", "auto", "")
_ADVICE = "save the template as a Jinja file and set chat_template: FILE"


def named_template(draft: ImportDraft, key: str, name: str, has_tools: bool = False) -> None:
    """Read a template by name as ours that renders the same, or as the tokenizer's own where the model carries that format; else refuse it.

    LLaMA-Factory writes tools in ways that ours of its names do not, so rows that have tools (`has_tools`) are left to the tokenizer's own.
    """
    built_in = BUILT_IN.get(draft.tool, {}).get(name)
    if name in TOKENIZERS_OWN and not built_in:
        draft.leave(key, f"{name or 'it is empty'}: the tokenizer's own template is the default here")
        return
    if built_in and not has_tools:
        draft.put("chat_template", built_in, key, "it renders what the template of that name does there")
        if draft.tool == "LLaMA-Factory" and name in EOS:
            draft.put("special_tokens", {"eos_token": EOS[name]}, key, "the template makes it the end of a text there")
        return
    model = str(draft.keys.get("base_model", "")).rpartition("/")[2]
    if name.startswith("tokenizer_default_fallback_"):
        draft.change(key, "the tokenizer's own template is used, and a run stops where there is none")
    elif any(re.fullmatch(names, name) and re.search(models, model, re.IGNORECASE) for names, models in OWN):
        draft.change(
            key,
            f"{name} is the format that {model}'s own tokenizer carries, and that one is used; `posttrain data` shows the rows as rendered",
        )
    else:
        tools = ", and its own template here writes no tools" if built_in else ""
        why = f"{name}: a template by name, and {model or 'the model'} is not known to carry it{tools}"
        draft.refuse(key, why, _ADVICE)
