import pickle
import random

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from bt.data import text as text_module
from bt.data.text import load_tokenizer, make_tokenizer, pretrained_tokenizer, train_tokenizer
from bt.errors import ConfigError, DataError
from bt.tasks.base import Context
from bt.tasks.mlm import MLM

TEXTS = ["A red dog.", "a red CAT, a cat?", "the dog's red"]


def test_vocabulary_is_by_frequency_then_alphabet():
    trained = train_tokenizer(TEXTS)
    words = sorted(trained.backend.get_vocab(), key=trained.backend.get_vocab().get)
    assert words[:5] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert words[5:] == ["a", "red", "cat", "dog", "'", ",", ".", "?", "s", "the"]
    assert (trained.bos_id, trained.pad_id, trained.eos_id, trained.mask_id) == (0, 1, 2, 4)
    assert trained.special_ids == [0, 1, 2, 3, 4] and trained.vocab_size == 15
    shuffled = TEXTS * 1
    random.Random(0).shuffle(shuffled)
    assert train_tokenizer(iter(shuffled)).backend.to_str() == trained.backend.to_str()


def test_encoding():
    trained = train_tokenizer(TEXTS)
    assert trained.encode(["The RED zebra", "a dog"], 50) == [[0, 14, 6, 3, 2], [0, 5, 8, 2]]
    assert trained.decode([0, 14, 6, 8, 2, 1, 1]) == "the red dog"


def test_long_texts_keep_start_and_end():
    trained = train_tokenizer(TEXTS)
    whole = trained.encode(["the red dog , a cat ?"], 50)[0]
    assert trained.encode(["the red dog , a cat ?"], 9)[0] == whole and len(whole) == 9
    assert trained.encode(["the red dog , a cat ?"], 5)[0] == [*whole[:4], 2]


def test_vocabulary_size_counts_special_tokens():
    assert train_tokenizer(TEXTS, 8).vocab_size == 8
    assert train_tokenizer(TEXTS, 8).encode(["a red cat dog"], 9) == [[0, 5, 6, 7, 3, 2]]
    with pytest.raises(ConfigError, match="vocab_size=5"):
        train_tokenizer(TEXTS, 5)


def test_a_batch_is_padded_to_its_longest_text():
    texts = train_tokenizer(TEXTS).batch(["a", "a red dog"], 50)
    assert texts.ids.tolist() == [[0, 5, 2, 1, 1], [0, 5, 6, 8, 2]]
    assert texts.mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_saved_and_copied_tokenizers_are_the_same(tokenizer, train_set, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded, copy = load_tokenizer(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))
    texts = list(dict.fromkeys(train_set.all_texts()))
    expected = tokenizer.encode(texts, 20)
    assert loaded.encode(texts, 20) == copy.encode(texts, 20) == expected
    assert loaded.special_ids == tokenizer.special_ids and loaded.vocab_size == tokenizer.vocab_size == 33
    assert [tokenizer.decode(ids) for ids in expected] == [t.replace("?", " ?") for t in texts]  # words and ? alone


def test_unknown_words_of_other_splits_are_few(tokenizer, data_dir):
    from bt.data.shards import ShardSet

    ids = tokenizer.encode(list(ShardSet(data_dir, "test").all_texts()), 50)
    assert all(3 not in row for row in ids)


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(text_module, "_CACHED_TEXTS", 3)
    trained = train_tokenizer(TEXTS)
    expected = {text: trained.encode([text], 9)[0] for text in ("a", "red", "dog", "cat", "the")}
    assert trained.encode(["a", "cat", "the", "a"], 9) == [expected[t] for t in ("a", "cat", "the", "a")]
    assert len(trained._cache) <= 3


@pytest.fixture
def bert_folder(tmp_path):
    """A tokenizer folder as transformers saves one, with BERT's special tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "dog"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    saved = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **roles)
    saved.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_pretrained_tokenizers_equal_transformers(bert_folder):
    ours, theirs = pretrained_tokenizer(str(bert_folder)), PreTrainedTokenizerFast.from_pretrained(bert_folder)
    texts = ["red dog red", "blue"]
    for length in (50, 4):
        assert ours.encode(texts, length) == theirs(texts, truncation=True, max_length=length).input_ids
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id, ours.vocab_size) == (2, 3, 0, 4, 7)
    assert ours.special_ids == [0, 1, 2, 3, 4]


def test_clips_tokenizer_has_no_mask_token(tmp_path):
    """It serves tasks without MLM, and is known again from a run's tokenizer.json; MLM says what it lacks."""
    words = ["<|startoftext|>", "<|endoftext|>", "red", "dog"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        f"{words[0]} $A {words[1]}", None, [(words[0], 0), (words[1], 1)]
    )
    roles = {"bos_token": words[0], "eos_token": words[1], "pad_token": words[1]}
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=words[1], **roles).save_pretrained(tmp_path / "clip")
    found = pretrained_tokenizer(str(tmp_path / "clip"))
    found.save(tmp_path / "tokenizer.json")
    for ours in (found, load_tokenizer(tmp_path / "tokenizer.json")):
        assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id) == (0, 1, 1, None)
        assert ours.batch(["red dog", "dog"], 9).ids.tolist() == [[0, 2, 3, 1], [0, 3, 1, 1]]
    with pytest.raises(ConfigError, match="the tokenizer of encoder.text has no mask token, which MLM needs"):
        MLM(Context(16, 16, 16, found))


def test_choice_by_configuration(bert_folder):
    assert make_tokenizer("pretrained", [], name=str(bert_folder)).vocab_size == 7
    assert make_tokenizer("trained", TEXTS, vocab_size=9).vocab_size == 9
    with pytest.raises(ConfigError, match="tokenizer.kind=other: allowed are pretrained, trained"):
        make_tokenizer("other", TEXTS)
    with pytest.raises(ConfigError, match="tokenizer.name must name"):
        make_tokenizer("pretrained", TEXTS)


def test_unreadable_tokenizers_are_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for fails in (
        lambda: load_tokenizer(tmp_path / "tokenizer.json"),
        lambda: load_tokenizer(tmp_path / "nothing.json"),
        lambda: pretrained_tokenizer(str(tmp_path / "nothing")),
    ):
        with pytest.raises(DataError, match=str(tmp_path)) as caught:
            fails()
        assert "\n" not in str(caught.value)
