"""What the demo is measured against on easy-VQA: the majority answer, the question alone, the author's CNN.

    python -m bt.bench.baselines [--out FILE]

The CNN has the layers, loss, optimizer and eight epochs of the data set author's Keras model (vzhou842/easy-VQA-keras:
model.py, train.py, prepare_data.py), written in PyTorch. All three are trained on all 4,000 training images' questions
and scored on the test questions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from easy_vqa import (
    get_answers,
    get_test_image_paths,
    get_test_questions,
    get_train_image_paths,
    get_train_questions,
)
from PIL import Image
from torch import Tensor, nn

RECORDED = Path(__file__).with_name("baselines.json")
EPOCHS, BATCH = 8, 32


def bags_of_words(texts: list[str], vocabulary: dict[str, int]) -> Tensor:
    """(texts, words) float: 1 where the word occurs, as Keras' Tokenizer.texts_to_matrix."""
    bags = torch.zeros(len(texts), len(vocabulary))
    for row, text in enumerate(texts):
        for word in re.findall(r"\w+", text):
            if word in vocabulary:
                bags[row, vocabulary[word]] = 1
    return bags


def load_images(paths: dict[int, str], image_ids: list[int]) -> tuple[Tensor, Tensor]:
    """Unique images (images, 3, 64, 64) in [-0.5, 0.5] and the image row of every question."""
    order = sorted(paths)
    pixels = np.stack([np.asarray(Image.open(paths[i]).convert("RGB")) for i in order])
    rows = {image_id: row for row, image_id in enumerate(order)}
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5
    return images, torch.tensor([rows[i] for i in image_ids])


class AuthorsCNN(nn.Module):
    def __init__(self, words: int, answers: int):
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(16 * 16 * 16, 32), nn.Tanh(),
        )  # fmt: skip
        self.question = nn.Sequential(nn.Linear(words, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.answer = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, answers))
        for module in self.modules():  # Keras' default initialisation
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, bags: Tensor) -> Tensor:
        return self.answer(self.image(images) * self.question(bags))


def question_only(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Accuracy of the most frequent training answer to the very same question text (majority if never asked)."""
    counts: dict[bytes, Tensor] = {}
    for bag, label in zip(*train, strict=True):
        counts.setdefault(bag.numpy().tobytes(), torch.zeros(13))[label] += 1
    overall = torch.bincount(train[1], minlength=13).float()
    guesses = torch.stack([counts.get(bag.numpy().tobytes(), overall) for bag in test[0]]).argmax(1)
    return (guesses == test[1]).float().mean().item()


def train_cnn(train, test, words: int, answers: int) -> float:
    """Test accuracy of the epoch with the lowest test loss (the author's ModelCheckpoint watches the test set)."""
    torch.manual_seed(0)
    model = AuthorsCNN(words, answers)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4, eps=1e-7)
    images, rows, bags, labels = train
    best_loss, best_accuracy = float("inf"), 0.0
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(model(images[rows[chosen]], bags[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            test_images, test_rows, test_bags, test_labels = test
            parts = [model(test_images[test_rows[c]], test_bags[c]) for c in torch.arange(len(test_labels)).split(512)]
            logits = torch.cat(parts)
            test_loss = F.cross_entropy(logits, test_labels).item()
            accuracy = (logits.argmax(1) == test_labels).float().mean().item()
        print(
            f"author's CNN, epoch {epoch + 1} of {EPOCHS}: test loss {test_loss:.4f}, accuracy {accuracy:.4f}",
            flush=True,
        )
        if test_loss < best_loss:
            best_loss, best_accuracy = test_loss, accuracy
    return best_accuracy


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def measure() -> dict:
    torch.set_num_threads(1)
    train_texts, train_answers, train_ids = get_train_questions()
    test_texts, test_answers, test_ids = get_test_questions()
    answers = get_answers()
    words = sorted({word for text in train_texts for word in re.findall(r"\w+", text)})
    vocabulary = {word: i for i, word in enumerate(words)}
    train_bags, test_bags = bags_of_words(train_texts, vocabulary), bags_of_words(test_texts, vocabulary)
    train_labels = torch.tensor([answers.index(a) for a in train_answers])
    test_labels = torch.tensor([answers.index(a) for a in test_answers])
    majority = train_labels.bincount().argmax()
    start = time.perf_counter()
    cnn = train_cnn(
        (*load_images(get_train_image_paths(), train_ids), train_bags, train_labels),
        (*load_images(get_test_image_paths(), test_ids), test_bags, test_labels),
        len(words), len(answers),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, one thread, torch {torch.__version__}",
        "command": "make baselines",
        "accuracy": {
            "majority answer": (test_labels == majority).float().mean().item(),
            "question only": question_only((train_bags, train_labels), (test_bags, test_labels)),
            "author's CNN": cnn,
        },
        "seconds": {"author's CNN": seconds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo's baselines again and record them.")
    parser.add_argument("--out", type=Path, default=RECORDED, help="where to write the record")
    arguments = parser.parse_args()
    record = measure()
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    for name, accuracy in record["accuracy"].items():
        print(f"{name:16s} {100 * accuracy:6.2f} %")


if __name__ == "__main__":
    main()
