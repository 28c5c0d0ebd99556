"""Finding a tokenizer: files, folders, old folders, names; saving one that others open."""

import json

import huggingface_hub
import pytest
import transformers

from tinsmith.core.errors import UserError
from tinsmith.text.chat import parse_conversation, render
from tinsmith.text.specials import our_template
from tinsmith.text.tokenizer import SPECIALS, Tokenizer


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_tokenizer_is_loaded_as_it_was(tokenizer, folder):
    for place in (folder, folder / "tokenizer.json", str(folder)):
        loaded = Tokenizer.load(place)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.chat_template == our_template()


def test_a_run_folder_stands_for_its_final_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "run" / "final")
    assert Tokenizer.load(tmp_path / "run").fingerprint() == tokenizer.fingerprint()


def test_saving_twice_writes_the_same_bytes(tokenizer, folder, tmp_path):
    tokenizer.save(tmp_path / "again")
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("family", ["own", "gpt2", "llama", "metaspace"])
def test_auto_tokenizer_opens_the_folder_and_agrees_on_ids(families, corpus, tmp_path, family):
    tokenizer = families[family].for_chats()
    tokenizer.save(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*corpus, "the fox <x> 12", "a"]:
        assert auto(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert len(auto) == tokenizer.vocab_size
    assert auto.eos_token_id == tokenizer.end_of_text
    assert auto.pad_token == (None if family == "gpt2" else "<|endoftext|>")  # as its folder
    assert auto.chat_template == our_template()


def test_auto_tokenizer_keeps_tags_when_it_skips_specials(tokenizer, folder):
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.special(name) for name in SPECIALS]
    kept = auto.decode(ids, skip_special_tokens=True)
    assert kept.replace(" ", "") == "".join(n for n in SPECIALS if not n.startswith("<|"))


def test_an_old_gpt2_folder_has_the_ids_that_transformers_gives(gpt2_folder, corpus):
    reference = transformers.GPT2Tokenizer.from_pretrained(gpt2_folder)
    tokenizer = Tokenizer.load(gpt2_folder)
    for text in [*corpus, "  two  blanks ", "don't 1234"]:
        assert tokenizer.encode(text) == reference(text)["input_ids"]


def test_added_tokens_of_an_old_folder_keep_their_ids(gpt2_folder, tmp_path):
    size = len(json.loads((gpt2_folder / "vocab.json").read_text()))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
    added = tmp_path / "added_tokens.json"
    added.write_text(json.dumps({"<a>": size + 1, "<b>": size}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.special("<b>"), loaded.special("<a>")) == (size, size + 1)
    added.write_text(json.dumps({"<a>": size + 7}))
    with pytest.raises(UserError, match=r"added_tokens\.json: the id of '<a>'"):
        Tokenizer.load(tmp_path)


def test_a_foreign_tokenizer_stays_itself_when_saved_and_loaded(families, tmp_path):
    for name, tokenizer in families.items():
        tokenizer.save(tmp_path / name)
        again = Tokenizer.load(tmp_path / name)
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.end_of_text == tokenizer.end_of_text


@pytest.mark.parametrize("form", ["beside", "inside", "listed"])
def test_a_template_of_its_own_is_kept(folder, tmp_path, form):
    own = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if form == "beside":
        (folder / "chat_template.jinja").write_text(own)
    else:
        (folder / "chat_template.jinja").unlink()
        listed = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": own}]
        config["chat_template"] = own if form == "inside" else listed
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(folder)
    assert loaded.chat_template == own
    loaded.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").chat_template == own


def test_the_end_of_text_of_a_folder_is_not_its_end_of_turn(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|im_end|>", "special": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(folder)
    assert (loaded.end_of_text, loaded.end_of_turn) == (0, 2)


def test_a_name_is_fetched_from_the_hub_and_output_so(folder, monkeypatch, capsys):
    requested = []

    def fetch(name, allow_patterns):
        requested.append((name, "tokenizer.json" in allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Tokenizer.load("someone/tiny-model").vocab_size == 800
    assert requested == [("someone/tiny-model", True)]
    assert "someone/tiny-model" in capsys.readouterr().err


def test_a_name_that_cannot_be_fetched_is_one_line():
    """The tests run with HF_HUB_OFFLINE."""
    with pytest.raises(UserError, match=r"nobody/no-such-model: no such path") as caught:
        Tokenizer.load("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_what_is_clearly_a_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/typo", "./x", "/no/such/folder", "a/b/c", ""):
        with pytest.raises(UserError, match=r"no such file or folder|has no tokenizer\.json"):
            Tokenizer.load(name or tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not UTF-8"),
        ("tokenizer_config.json", "{,", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: not a JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "tokenizer_config.json: a token"),
        ("tokenizer_config.json", '{"eos_token": {}}', "tokenizer_config.json: a token"),
    ],
)
def test_a_broken_file_is_named_in_one_line(folder, name, content, message):
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(folder)
    assert "\n" not in str(caught.value)


def test_broken_old_folders_are_named_in_one_line(gpt2_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((gpt2_folder / name).read_bytes())
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such pair\n")
    with pytest.raises(UserError, match="do not agree"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match=r"a Qwen2Tokenizer without tokenizer\.json"):
        Tokenizer.load(tmp_path)


CHATS = {
    "plain": {"messages": [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")]},
    "turns": {
        "messages": [("user", "a"), ("assistant", "b"), ("user", " c\n"), ("assistant", "d")]
    },
    "reasoning": {
        "messages": [("user", "1+1"), ("assistant", "2", {"reasoning_content": "one\ntwo"})]
    },
    "tools": {
        "tools": [{"type": "function", "function": {"name": "add", "description": "\u00e9 <b>"}}],
        "messages": [
            ("system", "Use tools."),
            ("user", "1+1"),
            (
                "assistant",
                "",
                {
                    "tool_calls": [
                        {"name": "add", "arguments": {"x": 1, "y": '"\u4e2d"'}},
                        {"name": "n"},
                    ]
                },
            ),
            ("tool", "2"),
            ("tool", "3"),
            ("assistant", "It is 2."),
        ],
    },
    "tools without a system message": {
        "tools": [{"name": "f"}],
        "messages": [("user", "x"), ("assistant", "y")],
    },
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("generate", [False, True])
def test_transformers_renders_a_chat_as_we_do(folder, name, generate):
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    chat = CHATS[name]
    messages = [
        {"role": role, "content": content} | (more[0] if more else {})
        for role, content, *more in chat["messages"]
    ]
    record = {"messages": messages, "tools": chat.get("tools")}
    conversation = parse_conversation(record)
    for message in messages:
        for call in message.get("tool_calls", []):
            call.setdefault("arguments", {})
    for thinking in (None, True, False):
        options = {} if thinking is None else {"open_thinking": thinking}
        expected = auto.apply_chat_template(
            messages,
            tools=chat.get("tools"),
            tokenize=False,
            add_generation_prompt=generate,
            **options,
        )
        assert render(conversation, generate, thinking) == expected
