"""T5 and UMT5 against transformers: the networks, and the tokenizer from each of its files."""

import sys

import jax
import numpy as np
import peers
import pytest
import torch
import transformers
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.models.t5.modeling_t5 import T5Attention

import flaxdiff
from flaxdiff.models.t5 import buckets
from flaxdiff.pipelines import spiece, text

rng = np.random.default_rng(0)
TINY = dict(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)
TINY |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=16)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("name", "feed_forward"),
    [("T5EncoderModel", "relu"), ("T5EncoderModel", "gated-gelu"), ("UMT5EncoderModel", "gated-gelu")],
)
def test_encoder(name, feed_forward, scan, tmp_path):
    """Texts of two lengths, of which what fills up the shorter one is not seen; and there and back again."""
    cls = getattr(transformers, name)
    peer = peers.lively(cls(cls.config_class(**TINY, feed_forward_proj=feed_forward)))
    peer.save_pretrained(tmp_path / "theirs")
    spec, params = getattr(flaxdiff, name).from_pretrained(tmp_path / "theirs", scan_layers=scan)
    ids, mask = rng.integers(1, 99, (2, 40)), np.arange(40) < np.array([[40], [13]])
    with torch.no_grad():
        theirs = peer(torch.tensor(ids), attention_mask=torch.tensor(mask).long()).last_hidden_state
    assert peers.relative(flaxdiff.apply(spec, params, ids, mask), theirs, of=name) < 1e-4

    flaxdiff.checkpoint.save_model(tmp_path / "ours", spec, params)
    again = cls.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in peer.state_dict().items())


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 16)])
def test_buckets(count, furthest):
    places = torch.arange(600)
    theirs = T5Attention._relative_position_bucket(places[None] - places[:, None], True, count, furthest)
    assert np.array_equal(buckets(600, count, furthest), theirs)


def test_split_over_devices():
    """The layers of a pair over the axis of tensors, as in all transformers."""
    spec = flaxdiff.T5EncoderModel.from_config(TINY | {"feed_forward_proj": "gated-gelu"})
    mesh = flaxdiff.make_mesh({"tensor": 1}, jax.devices()[:1])
    found = flaxdiff.shardings({"text_encoder_3": flaxdiff.abstract(spec)}, mesh)["text_encoder_3"]
    split = lambda name: tuple(found[f"encoder.block.layer.{name}.weight"].spec)
    for name in ("0.SelfAttention.q", "0.SelfAttention.v", "1.DenseReluDense.wi_0", "1.DenseReluDense.wi_1"):
        assert split(name) == (None, None, "tensor"), name
    assert split("0.SelfAttention.o") == split("1.DenseReluDense.wo") == (None, "tensor", None)
    assert split("0.layer_norm") == ()


# --- the tokenizer ---------------------------------------------------------------------------------------------------

TEXTS = ["a red dog", "", "Red?  dogs <extra_id_0> ed", "a " * 30]  # the last two are long


@pytest.fixture
def folder(tmp_path):
    """A folder with the tokenizer as `tokenizer.json`."""
    peers.t5_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def sentencepiece(vocab, charsmap=b"") -> bytes:
    """A model of SentencePiece with this vocabulary."""
    message = import_protobuf().ModelProto()
    for i, (piece, score) in enumerate(vocab):
        message.pieces.add(piece=piece, score=score, type={0: 3, 1: 3, 2: 2}.get(i, 1))
    message.trainer_spec.unk_id = 2
    message.normalizer_spec.precompiled_charsmap = charsmap
    return message.SerializeToString()


@pytest.mark.parametrize("name", ["T5Tokenizer", "T5TokenizerFast"])
def test_tokenizer(name, folder):
    options = dict(padding="max_length", max_length=12, truncation=True)
    theirs = peers.t5_tokenizer()(TEXTS, **options)["input_ids"]
    with pytest.warns(UserWarning, match="longer than 12 tokens; its end is not read: …") as said:
        assert np.array_equal(text.Tokenizer(str(folder), name)(TEXTS, 12), theirs)
    assert [str(warning.message)[-4:] for warning in said] == [" ed'", " a '"]


@pytest.mark.filterwarnings("ignore:The prompt is longer")
def test_tokenizer_of_sentencepiece(folder, tmp_path_factory):
    """`spiece.model` alone gives the ids that `tokenizer.json` does, and is written as that."""
    alone = tmp_path_factory.mktemp("alone")
    (alone / "spiece.model").write_bytes(sentencepiece(peers.PIECES))
    (alone / "tokenizer_config.json").write_text('{"extra_ids": 4, "model_max_length": 12, "unk_token": "<unk>"}')
    made, plain = (text.Tokenizer(str(at), "T5Tokenizer") for at in (alone, folder))
    assert np.array_equal(made(TEXTS), plain(TEXTS, 12))
    made.save(alone / "saved")
    assert np.array_equal(text.Tokenizer(str(alone / "saved"), "T5Tokenizer")(TEXTS), plain(TEXTS, 12))
    assert "sentencepiece" not in sys.modules


def test_pieces(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(sentencepiece(peers.PIECES, b"\x00\x80map"))
    vocab, charsmap = spiece.read(path)
    assert charsmap == b"\x00\x80map" and [piece for piece, _ in vocab] == [piece for piece, _ in peers.PIECES]
    assert np.allclose([score for _, score in vocab], [score for _, score in peers.PIECES])


@pytest.mark.parametrize("content", [b"", b"\x0a", b"\x0a\x7fabc", b"\x0a\x02\x08\x01", b"not a model"])
def test_a_damaged_model(content, tmp_path):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match="spiece.model: it is no SentencePiece model: .* download or write it again"):
        text.Tokenizer(str(tmp_path), "T5Tokenizer")(["a"], 4)


def test_full_size_attends_in_bfloat16():
    """The largest encoder in use, by shapes alone: its output has the dtype of its weights."""
    from flaxdiff.published import COMPONENTS

    name, config = COMPONENTS["T5 v1.1 XXL text encoder"]
    spec = getattr(flaxdiff, name).from_config(config)
    ids = jax.ShapeDtypeStruct((1, 512), np.int32)
    out = jax.eval_shape(lambda p, i: flaxdiff.apply(spec, p, i), flaxdiff.abstract(spec, jax.numpy.bfloat16), ids)
    assert out.dtype == jax.numpy.bfloat16
