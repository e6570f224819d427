"""Records, formats, chats and tokens: malora_dist.data up to one tokenised sample."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from malora_dist.config_sections import TaskConfig
from malora_dist.data.formats import Example, Segment, load_examples
from malora_dist.data.reading import Reading
from malora_dist.data.tokenization import TokenizedExample, encode_example, fit
from malora_dist.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character, BOS in front of what it encodes, a ChatML template."""
    tokens = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *string.printable]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], chat_template=CHATML,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer()


@pytest.fixture(scope="module")
def llama_tokenizer(shared: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(shared / "models" / "stories260k")


def write(path: Path, *records: object) -> str:
    """A JSON Lines file of the records; a string is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def load(path: str, tokenizer: PreTrainedTokenizerBase | None = None, **task: str) -> list[Example]:
    return load_examples(TaskConfig(path=path, **task), tokenizer)


def tokens_of(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase, trained: bool) -> str:
    ids = [i for i, t in zip(example.token_ids, example.trained, strict=True) if t is trained]
    return "".join(tokenizer.convert_ids_to_tokens(ids))


# --- formats ---------------------------------------------------------------------------------


def test_alpaca_with_and_without_input(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "three"},
        {"instruction": "Hi {x}", "input": "", "output": "Ho"},
        {"instruction": "Hi", "input": None, "output": "Ho"},
    )
    both, braces, null = load(path)
    assert both.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    )
    assert (both.answer, both.reference) == ("3", "three")
    assert braces.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nHi {x}\n\n### Response:"
    )
    assert braces.reference == ""
    assert "### Input" not in null.prompt


def test_gsm8k_and_completion(tmp_path: Path) -> None:
    (gsm,) = load(write(tmp_path / "g.jsonl", {"question": "1+1?", "answer": "It is 2.\n#### 2"}))
    assert gsm.segments == (Segment("Question: 1+1?\nAnswer:", False), Segment(" It is 2.\n#### 2", True))
    assert gsm.reference == "2"
    (plain,) = load(write(tmp_path / "p.jsonl", {"prompt": "2020-01-01", "completion": "2020-01-02", "x": 1}))
    assert (plain.prompt, plain.answer) == ("2020-01-01", "2020-01-02")  # as written, not as a date


def test_json_array_json_lines_and_data_set_folder_agree(tmp_path: Path) -> None:
    records = [{"prompt": f"p{i}", "completion": "é"} for i in range(3)]
    lines = write(tmp_path / "lines.json", records[0], "", *records[1:])
    array = tmp_path / "array.json"
    array.write_text("\ufeff\n " + json.dumps(records, indent=1), encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", *records)
    found = [[(e.prompt, e.answer) for e in load(str(path))] for path in (lines, array, folder)]
    assert found == [[(f"p{i}", "é") for i in range(3)]] * 3
    assert load(lines)[1].source == f"{lines}:3"
    assert load(str(array))[1].source == f"{array}: record 2"


def test_edits_of_a_file_are_seen(tmp_path: Path) -> None:
    for answer in ("old", "new"):
        path = write(tmp_path / "t.jsonl", {"prompt": "p", "completion": answer})
        assert load(path)[0].answer == answer


def test_prompt_template(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"question": "Why?", "answer": "So #### x", "level": 3})
    (example,) = load(path, prompt_template="{{L{level}}} {question}>")
    assert (example.prompt, example.answer, example.reference) == ("{L3} Why?>", " So #### x", "x")
    other = write(tmp_path / "o.jsonl", {"text": "t", "completion": "c"})
    assert load(other, format="completion", prompt_template="{text}:")[0].prompt == "t:"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{nope}", r"data\[t\].prompt_template='{nope}': names {nope}, but the columns are prompt, completion; use"),
        ("{}", "names {}, but the columns are"),
        ("{prompt", "is no format string"),
    ],
)
def test_prompt_template_errors(tmp_path: Path, template: str, message: str) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(ConfigError, match=message):
        load(path, prompt_template=template)


def test_prompt_template_over_uneven_records(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"prompt": "p", "x": 1, "completion": "c"}, {"prompt": "p", "completion": "c"})
    with pytest.raises(DataError, match=r"t.jsonl:2: no column 'x' for prompt_template"):
        load(path, prompt_template="{x}")
    path = write(tmp_path / "u.jsonl", {"prompt": "p", "completion": "c"})
    with pytest.raises(DataError, match=r"t.jsonl: none of its 2 records .*t.jsonl:1: no column 'x.__class__' for"):
        load_examples(
            TaskConfig(path=str(tmp_path / "t.jsonl"), prompt_template="{x.__class__}"), None, Reading("skip")
        )
    with pytest.raises(DataError, match=r"u.jsonl:1: does not fit prompt_template"):
        load(path, prompt_template="{prompt:d}")


def test_columns_that_are_no_text_in_a_prompt_template(tmp_path: Path) -> None:
    """Null is empty, as in a data set whose columns may be left out; never a text that Python makes of a value."""
    record = {"prompt": "p", "completion": "c", "x": None}
    (example,) = load(write(tmp_path / "t.jsonl", record), prompt_template="{prompt}|{x}|{x!s:>2}")
    assert example.prompt == "p||  "
    for value, shown in (([1, "\ud800"], r'\[1, "\\ud800"\]'), ({"a": None}, '{"a": null}')):
        path = write(tmp_path / "t.jsonl", record, record | {"x": value})
        with pytest.raises(DataError, match=f"^{path}:2: x={shown}: prompt_template takes texts and numbers; write"):
            load(path, prompt_template="{x}")


@pytest.mark.parametrize("value", ["1" * 5000, '{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"], ids=["digits", "deep"])
def test_the_line_of_an_unusable_element_of_an_array(tmp_path: Path, value: str) -> None:
    (file := tmp_path / "t.json").write_text(f'\n[ {{"a": 1}},\n2,\n\n{value}, 3]')
    with pytest.raises(DataError, match=rf"^{file}:5: not usable JSON \("):
        load(str(file))


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([GOOD, '{"prompt": "p",}'], r"^{file}:2: not valid JSON \(.*, column 1\d\); a file is either"),
        (['[{"prompt": "p",', '"completion": }]'], r"^{file}:2: not valid JSON \(Expecting value, column 15\)"),
        ([GOOD, "", "[1]"], r"^{file}:3: a record must be a JSON object, not \[1\]; mend or remove it$"),
        (['["a"]'], r"^{file}: record 1: a record must be a JSON object, not \"a\""),
        ([GOOD, {"prompt": "p"}], r"^{file}:2: no column 'completion' \(found: prompt\); add it or remove the record$"),
        ([GOOD, {"prompt": "p", "completion": 3}], r"^{file}:2: completion=3: must be a string; mend or remove"),
        ([GOOD, {"prompt": None, "completion": "c"}], r"^{file}:2: prompt=null: must be a string"),
        ([{"a": 1, "b": 2}], r"^{file}:1: the columns a, b fit no format; rename them to those of alpaca \("),
        ([{"p\ud800": "p"}], r"^{file}:1: the columns p\\ud800 fit no format"),
        ([{**GOOD, "question": "q", "answer": "a"}], r"fit the formats gsm8k and completion; set format"),
        ([], r"^{file}: holds no records"),
        (["[]"], r"^{file}: holds no records"),
        (["", "  "], r"^{file}: holds no records"),
    ],
)  # fmt: skip
def test_file_errors(tmp_path: Path, content: list[object], message: str) -> None:
    path = write(tmp_path / "t.jsonl", *content)
    with pytest.raises(DataError, match=message.replace("{file}", path)) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_missing_files_and_wrong_bytes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: no such file; check the path"):
        load(str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match=r"neither a data file \(.*\) nor a data set with split 'train'"):
        load(str(tmp_path / "gone"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: not valid UTF-8"):
        load(str(tmp_path / "latin.jsonl"))
    with pytest.raises(ConfigError, match=r"data\[t\].format='xml': must be auto, alpaca, "):
        load(write(tmp_path / "t.jsonl", GOOD), format="xml")


def test_unknown_split_of_a_data_set_folder(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"data set with split 'dev' that can be loaded \(.*dev"):
        load(str(tmp_path), split="dev")


# --- chats -----------------------------------------------------------------------------------


def test_chat_takes_the_loss_on_every_assistant_turn(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "c.jsonl", {"messages": [*CHAT, {"role": "user", "content": "Bye"}]})
    (example,) = load(path, tokenizer)
    whole = tokenizer.apply_chat_template([*CHAT, {"role": "user", "content": "Bye"}], tokenize=False)
    assert "".join(segment.text for segment in example.segments) == whole
    assert [segment.text for segment in example.segments if segment.trained] == ["1<|im_end|>", "2<|im_end|>"]
    assert example.prompt.endswith("1<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n")
    encoded = encode_example(example, tokenizer)
    assert tokens_of(encoded, tokenizer, True) == "1<|im_end|>2<|im_end|>"  # no EOS after the template's own mark
    assert tokenizer.decode(encoded.token_ids).endswith("2<|im_end|>")  # what follows the last turn earns no loss
    assert encoded.token_ids == tokenizer(whole, add_special_tokens=False).input_ids[: len(encoded.token_ids)]


def test_chat_template_that_writes_bos_and_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    llama2 = letter_tokenizer()
    llama2.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    encoded = encode_example(load(write(tmp_path / "c.jsonl", {"messages": CHAT[1:]}), llama2)[0], llama2)
    assert encoded.starts_with_bos
    assert llama2.decode(encoded.token_ids) == "<s>[INST] One? [/INST] 1 </s><s>[INST] Two? [/INST] 2 </s>"
    assert tokens_of(encoded, llama2, True) == " 1 </s> 2 </s>"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages must be a list of objects"),
        (["hi"], "messages must be a list of objects"),
        ([{"role": "user"}], r"c.jsonl:1, message 1: no column 'content'"),
        ([{"role": "bot", "content": "x"}], r"message 1: role='bot': must be one of system, user, assistant"),
        (CHAT[:2], "must have an assistant turn, but not as the first"),
        (CHAT[2:], "must have an assistant turn, but not as the first"),
        ([*CHAT[:2], {"role": "assistant", "content": " "}], "message 3: content=' ': an assistant must say something"),
    ],
)
def test_chat_record_errors(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, messages: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "c.jsonl", {"messages": messages}), tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "needs a tokenizer with a chat template, and '.*' has none; take that of the model's instruct version"),
        ("{{ raise_exception('no system') }}", r"the chat template refuses the messages \(no system\)"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "puts no mark after assistant messages"),
        (
            "{% for m in messages %}{{ '' if m.role[0] == 'a' else 'u' }}{% endfor %}",
            "leaves out message 3; mend",
        ),
        ("{{ messages | length }}" + CHATML, "renders message 3 differently once others follow"),
    ],
)
def test_chat_template_errors(tmp_path: Path, template: str | None, message: str) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = template
    path = write(tmp_path / "c.jsonl", {"messages": CHAT})
    with pytest.raises(DataError, match=message):
        load(path, tokenizer)
    with pytest.raises(ConfigError, match="does not apply to format messages"):
        load(path, tokenizer, prompt_template="x")


# --- tokens ----------------------------------------------------------------------------------


def test_bos_eos_and_trained_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example((Segment("ab", False), Segment("cd", True), Segment("e", False), Segment("f", True)))
    encoded = encode_example(example, tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoded.token_ids) == ["<s>", *"abcd", "</s>", *"ef", "</s>"]
    assert encoded.trained == [bool(int(c)) for c in "000111011"]
    written = encode_example(Example((Segment("<s>ab", False), Segment("cd</s>", True))), tokenizer)
    assert tokenizer.convert_ids_to_tokens(written.token_ids) == ["<s>", *"abcd", "</s>"]  # neither is doubled


def test_tokenizer_without_bos_or_eos() -> None:
    example = Example((Segment("a", False), Segment("b", True)))
    bare = letter_tokenizer()
    bare.bos_token = None
    encoded = encode_example(example, bare)
    assert bare.convert_ids_to_tokens(encoded.token_ids) == ["a", "b", "</s>"]
    assert not encoded.starts_with_bos
    named = letter_tokenizer()  # names a BOS but does not put it in front, as SmolLM's
    named.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert encode_example(example, named).token_ids == encoded.token_ids
    bare.eos_token = None
    with pytest.raises(DataError, match="has no EOS token, so no answer could end; set eos_token"):
        encode_example(example, bare)


def test_prompt_and_answer_do_not_grow_together() -> None:
    """The prompt keeps the tokens it has at inference even where the answer would merge with it."""
    tokens = ["<pad>", "</s>", "a", "b", "c", "ab"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b")], unk_token="<pad>"))
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoded = encode_example(Example((Segment("ca", False), Segment("bc", True))), merging)
    assert merging.convert_ids_to_tokens(encoded.token_ids) == ["c", "a", "b", "c", "</s>"]
    assert encoded.trained == [False, False, True, True, True]


def test_real_tokenizer_token_by_token(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example((Segment("Question: 4?\nAnswer:", False), Segment(" 42", True)))
    encoded = encode_example(example, llama_tokenizer)
    tokens = llama_tokenizer.convert_ids_to_tokens(encoded.token_ids)
    prompt = llama_tokenizer.convert_ids_to_tokens(llama_tokenizer("Question: 4?\nAnswer:").input_ids)
    assert tokens == [*prompt, "▁", "4", "2", "</s>"]  # one space: a tokenizer of the answer alone would write two
    assert encoded.trained == [False] * len(prompt) + [True] * 4
    assert llama_tokenizer.decode(encoded.token_ids, skip_special_tokens=True) == "Question: 4?\nAnswer: 42"


@pytest.mark.parametrize(
    ("template", "ended_right"),
    [("Q: {q}\nA: ", 11), ("Q: {q}\nA:  ", 11), ("Q: {q}\nA:", 40), ("{q}\n", 40), ("{q}\t", 40)],
)
def test_samples_decode_to_their_text(
    template: str, ended_right: int, shared: Path, llama_tokenizer: PreTrainedTokenizerBase
) -> None:
    """No space is put between prompt and answer, and the tokens stay what they were where there was none."""
    lines = (shared / "data" / "math" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    unchanged = 0
    for record in map(json.loads, lines):
        prompt, answer = template.format(q=record["question"]), record["answer"]
        encoded = encode_example(Example((Segment(prompt, False), Segment(answer, True))), llama_tokenizer)
        assert llama_tokenizer.decode(encoded.token_ids, skip_special_tokens=True) == prompt + answer
        head = llama_tokenizer(prompt).input_ids
        assert encoded.token_ids[: len(head)] == head  # as at inference
        by_itself = llama_tokenizer(answer, add_special_tokens=False).input_ids
        behind = llama_tokenizer(prompt + answer).input_ids[len(head) :]
        unchanged += encoded.token_ids[len(head) : -1] in (by_itself, behind)
    assert unchanged == ended_right


def test_an_answer_that_makes_a_word_with_the_last_letter(llama_tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_example(Example((Segment("t ", False), Segment("he", True))), llama_tokenizer)
    assert llama_tokenizer.decode(encoded.token_ids, skip_special_tokens=True) == "t he"


def test_a_tokenizer_that_reads_line_breaks_as_spaces() -> None:
    tokens = ["<pad>", "</s>", "▁", *"abc:", "▁a"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", "a")], unk_token="<pad>"))
    steps = [normalizers.Replace("\n", " "), normalizers.Strip(right=False), normalizers.Prepend("▁")]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoded = encode_example(Example((Segment("b: ", False), Segment("ac", True))), spaced)
    assert spaced.convert_ids_to_tokens(encoded.token_ids) == ["▁", "b", ":", "▁", "a", "c", "</s>"]


@pytest.mark.parametrize(
    "file", ["math/gsm8k_test.jsonl", "code/code_alpaca_2k.json", "commonsense/arc_challenge_test.json"]
)
def test_real_files(shared: Path, llama_tokenizer: PreTrainedTokenizerBase, file: str) -> None:
    path = shared / "data" / file
    text = path.read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    examples = load(str(path))
    assert [e.answer.strip() for e in examples] == [r.get("output", r.get("answer")).strip() for r in records]
    for example in examples[:: len(examples) // 20]:
        encoded = encode_example(example, llama_tokenizer)
        learned = [i for i, t in zip(encoded.token_ids, encoded.trained, strict=True) if t]
        assert learned[-1] == llama_tokenizer.eos_token_id
        assert llama_tokenizer.decode(learned, skip_special_tokens=True).strip() == example.answer.strip()
        assert encoded.trained == sorted(encoded.trained)  # the prompt first, then the answer
        assert encoded.token_ids[0] == llama_tokenizer.bos_token_id


# --- length ----------------------------------------------------------------------------------

SAMPLE = TokenizedExample([1, 10, 11, 12, 20, 21, 2], [False] * 4 + [True] * 3, starts_with_bos=True, source="f:3")


@pytest.mark.parametrize(
    ("length", "kept"),
    [
        (7, [1, 10, 11, 12, 20, 21, 2]),
        (6, [1, 11, 12, 20, 21, 2]),  # the prompt's start goes first
        (4, [1, 20, 21, 2]),
        (3, [1, 20, 21]),  # then the answer's end
    ],
)
def test_truncate(length: int, kept: list[int]) -> None:
    fitted = fit(SAMPLE, length, "truncate")
    assert fitted is not None
    assert fitted.token_ids == kept
    assert fitted.trained == [i in (20, 21, 2) for i in kept]
    assert fitted.truncated == 7 - length


def test_truncate_keeps_the_last_answer_of_many() -> None:
    turns = TokenizedExample([10, 20, 11, 21, 22], [False, True, False, True, True])
    assert fit(turns, 3, "truncate") == TokenizedExample([11, 21, 22], [False, True, True], truncated=2)
    assert fit(turns, 1, "truncate") == TokenizedExample([21], [True], truncated=4)


def test_drop_and_error() -> None:
    assert fit(SAMPLE, 7, "drop") is SAMPLE
    assert fit(SAMPLE, 6, "drop") is None
    assert fit(SAMPLE, 7, "error") is SAMPLE
    with pytest.raises(DataError, match=r"^f:3: 7 tokens exceed seq_length=6; raise it, or set overlong"):
        fit(SAMPLE, 6, "error")
