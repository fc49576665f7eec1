"""The contrastive objective against transformers' BridgeTowerForContrastiveLearning on the same random weights."""

import math

import pytest
import torch
from transformers import BridgeTowerForContrastiveLearning

from bt.data.batch import Batch, Texts
from bt.interop.huggingface import from_huggingface, to_huggingface
from bt.tasks.base import Context, TaskModel
from bt.tasks.contrastive import Contrastive
from tests.interop.test_huggingface import TINY, configuration, inputs, own_model, randomise
from tests.models.towers import make_texts, make_tower
from tests.tasks.helpers import CONTEXT, TOKENIZER, make_batch

PAIRS, SIZE = 4, 24
# That class adds the type embedding before it has projected: all widths must be equal.
EQUAL = TINY | {"width": 64, "ffn": 128}


@pytest.fixture
def both():
    torch.manual_seed(0)
    config = configuration(EQUAL)
    config.contrastive_hidden_size, config.logit_scale_init_value = SIZE, 1.5
    theirs = BridgeTowerForContrastiveLearning(config).eval()
    randomise(theirs)
    tower = own_model(EQUAL).tower
    context = Context(EQUAL["width"], EQUAL["width"], EQUAL["vision"], TOKENIZER)
    ours = TaskModel(tower, {"contrastive": Contrastive(context, size=SIZE)}).eval()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    return theirs, ours


def batch_of(images: torch.Tensor, texts: Texts) -> Batch:
    rows = torch.arange(len(images))
    return Batch(images, texts, torch.stack([rows, rows], 1), rows, rows, {"contrastive": {"pair": rows}})


def test_loss_features_and_gradients(both):
    theirs, ours = both
    images, texts = inputs(EQUAL, PAIRS)
    expected = theirs(input_ids=texts.ids, attention_mask=texts.mask.long(), pixel_values=images, return_loss=True)
    expected.loss.backward()
    result = ours(batch_of(images, texts))["contrastive"]
    loss = result.loss / PAIRS
    loss.backward()
    for own, name in (("texts", "text_embeds"), ("images", "image_embeds"), ("cross", "cross_embeds")):
        torch.testing.assert_close(result.outputs[own], expected[name], rtol=0, atol=1e-5)
    scale = theirs.logit_scale.exp()
    logits = expected.text_embeds @ expected.cross_embeds.T * scale
    torch.testing.assert_close(result.outputs["text_to_cross"], logits, rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=2e-6)
    wanted = from_huggingface({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    found = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(found) > 80
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        # Key biases have no gradient but rounding, hence the absolute part.
        assert (found[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-6 * total, name


def test_the_heads_come_and_go(both):
    theirs, ours = both
    exported = to_huggingface(ours.state_dict())
    state = theirs.state_dict()
    assert all(torch.equal(exported[key], state[key]) for key in exported)
    assert {key for key in state if key not in exported} == {k for k in state if "text_model.pooler" in k}


def test_the_texts_of_an_image_are_no_negatives():
    """Two images with two texts each: the same terms written out."""
    model = TaskModel(make_tower(), {"contrastive": Contrastive(CONTEXT, size=8, temperature=0.5)}).eval()
    owner = [0, 1, 0, 1]
    pairs = [[image, text] for text, image in enumerate(owner)]
    result = model(make_batch(make_texts(4), pairs, {"contrastive": {"pair": torch.arange(4)}}))["contrastive"]
    total = 0.0
    for name, (rows, columns) in {
        "text_to_image": ("texts", "images"),
        "text_to_cross": ("texts", "cross"),
        "image_to_cross": ("images", "cross"),
    }.items():
        a, b = result.outputs[rows].tolist(), result.outputs[columns].tolist()
        for i in range(4):
            logits = [2 * sum(x * y for x, y in zip(a[i], b[j], strict=True)) for j in range(4)]
            assert result.outputs[name][i].tolist() == pytest.approx(logits, abs=1e-5)
            log_sum = math.log(sum(map(math.exp, logits)))
            total -= sum((logits[j] - log_sum) / 2 for j in range(4) if owner[j] == owner[i]) / 3
    assert result.loss.item() == pytest.approx(total, rel=1e-5)
    assert model.counts(make_batch(make_texts(1), [[0, 0]], {"contrastive": {"pair": torch.arange(1)}})) == 1
