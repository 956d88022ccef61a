"""The twelve transfer sets in miniature: a few pictures of 3 or 4 classes each, in the layouts of the real ones."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([[200, 60, 60], [60, 190, 70], [70, 80, 210], [200, 190, 60]])
VOC_CLASSES = ("aeroplane", "bicycle", "dog", "person")


def make_transfer_sets(root: Path, size: int = 24) -> None:
    """Write all twelve sets below ROOT; the same bytes at every call.

    Args:
        root: is made if it does not exist.
        size: height of the pictures; they are 0 to 2 pixels wider than high, and CIFAR's are 32 x 32 as always.
    """
    makers = (_food, _cifar10, _cifar100, _birdsnap, _sun, _cars, _aircraft, _voc, _dtd, _pets, _caltech, _flowers)
    for number, make in enumerate(makers):
        make(root, _Painter(number, size))


class _Painter:
    """Pictures whose colour tells the class, under noise; no two are equal."""

    def __init__(self, number, size):
        self.rng = np.random.default_rng(number)
        self.size = size
        self.painted = 0

    def pixels(self, classes, height, width):
        """(height, width, 3) uint8: one stripe for each of the classes."""
        colours = COLOURS[list(classes)][np.arange(width) * len(classes) // width]
        noise = self.rng.integers(-45, 46, (height, width, 3)) + self.rng.integers(-20, 21, 3)
        return np.clip(colours + noise, 0, 255).astype(np.uint8)

    def save(self, path, *classes):
        self.painted += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = self.pixels(classes, self.size, self.size + self.painted % 3)
        Image.fromarray(picture).save(path, "JPEG", quality=95)


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_mat(path, content):
    """A .mat file without the time of day in its header."""
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + buffer.getvalue()[116:])


def _food(root, painter):
    folder, lists = root / "food-101", {"train": {}, "test": {}}
    classes = ("apple_pie", "baby_back_ribs", "waffles")
    for split, start, count in (("train", 1000, 20), ("test", 5000, 8)):
        for c, name in enumerate(classes):
            lists[split][name] = [f"{name}/{start + 17 * i + c}" for i in range(count)]
            for image in lists[split][name]:
                painter.save(folder / "images" / f"{image}.jpg", c)
        _write(folder / "meta" / f"{split}.txt", [image for images in lists[split].values() for image in images])
        (folder / "meta" / f"{split}.json").write_text(json.dumps(lists[split]))
    _write(folder / "meta" / "classes.txt", classes)


def _cifar_file(path, painter, count, classes, coarse=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        c = i % classes
        planes = painter.pixels([c], 32, 32).transpose(2, 0, 1).tobytes()
        rows.append(bytes([9 + c, c] if coarse else [c]) + planes)
    path.write_bytes(b"".join(rows))


def _cifar10(root, painter):
    folder = root / "cifar-10-batches-bin"
    for i in range(1, 6):
        _cifar_file(folder / f"data_batch_{i}.bin", painter, 16, 4)
    _cifar_file(folder / "test_batch.bin", painter, 20, 4)
    _write(folder / "batches.meta.txt", ["airplane", "automobile", "bird", "cat", ""])


def _cifar100(root, painter):
    folder = root / "cifar-100-binary"
    _cifar_file(folder / "train.bin", painter, 60, 3, coarse=True)
    _cifar_file(folder / "test.bin", painter, 15, 3, coarse=True)
    _write(folder / "fine_label_names.txt", ["apple", "aquarium_fish", "baby"])
    _write(folder / "coarse_label_names.txt", [f"group_{i}" for i in range(12)])


def _birdsnap(root, painter):
    """Species ids with gaps, and test images in the midst of the others."""
    folder, images, tested = root / "birdsnap", [], []
    species = {3: "Coopers_Hawk", 17: "Blue_Jay", 401: "Snow_Goose"}
    for c, (number, name) in enumerate(species.items()):
        for i in range(20):
            path = f"{name}/{100 * number + 7 * i}.jpg"
            painter.save(folder / "images" / path, c)
            images.append(f"http://example.org/{name}/{i}.jpg\t{'0' * 32}\t{path}\t{number}\t1\t2\t20\t21\tnull\tnull")
            tested += [path] if i % 5 == 2 else []
    columns = "url md5 path species_id bb_x1 bb_y1 bb_x2 bb_y2 back_x back_y".split()
    _write(folder / "images.txt", ["\t".join(columns), *images])
    _write(folder / "test_images.txt", ["path", *tested])
    rows = [f"{number}\t{name.replace('_', ' ')}\tAves {name.lower()}\t{name}" for number, name in species.items()]
    _write(folder / "species.txt", ["id\tcommon\tscientific\tdir", *rows])


def _sun(root, painter):
    folder, lists = root / "SUN397", {"Training_01": [], "Testing_01": []}
    classes = ("/a/abbey", "/a/apartment_building/outdoor", "/b/bakery/shop")
    for c, name in enumerate(classes):
        for i in range(17):
            path = f"{name}/sun_{'aeiou'[i % 5] * 3}{1000 * c + i}.jpg"
            painter.save(folder / path[1:], c)
            if i < 15:  # the real partitions leave images out, too
                lists["Training_01" if i % 3 else "Testing_01"].append(path)
    _write(folder / "ClassName.txt", classes)
    for name, lines in lists.items():
        _write(folder / f"{name}.txt", lines)


def _cars(root, painter):
    folder = root / "stanford_cars"
    fields = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    files = {"train": "devkit/cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
    for split, count in (("train", 45), ("test", 15)):
        rows = np.zeros(count, [(name, object) for name in fields])
        for i in range(count):
            name = f"{i + 1:05d}.jpg"
            rows[i] = (1, 2, 20, 21, np.uint8(i % 3 + 1), name)
            painter.save(folder / f"cars_{split}" / name, i % 3)
        _write_mat(folder / files[split], {"annotations": rows})
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Volvo C30 Hatchback 2012"], object)
    _write_mat(folder / "devkit/cars_meta.mat", {"class_names": names})


def _aircraft(root, painter):
    """Variants have spaces and slashes, and are not in the order of the alphabet."""
    data = root / "fgvc-aircraft-2013b" / "data"
    classes = ("Boeing 707-320", "F-16A/B", "An-12")
    lists = {"train": [], "val": [], "test": []}
    for i in range(54):
        name = f"{2_000_000 - 31_337 * i:07d}"
        painter.save(data / "images" / f"{name}.jpg", i % 3)
        lists[("train", "val", "test")[i // 3 % 3]].append(f"{name} {classes[i % 3]}")
    _write(data / "variants.txt", classes)
    for split, lines in (*lists.items(), ("trainval", lists["train"] + lists["val"])):
        _write(data / f"images_variant_{split}.txt", lines)


def _voc(root, painter):
    """An image shows a class, and every third a second one, and every third a second one that is difficult only."""
    folder, number = root / "VOCdevkit" / "VOC2007", 0
    for split, count in (("train", 16), ("val", 16), ("test", 20)):
        truth = {}
        for i in range(count):
            number += 3
            first, second = i % 4, (i + 1 + i // 4 % 3) % 4
            objects = [(first, 0), (first, 1)] + [[], [(second, 0)], [(second, 1)]][i % 3]
            truth[f"{number:06d}"] = objects
            painter.save(folder / "JPEGImages" / f"{number:06d}.jpg", *dict.fromkeys(c for c, _ in objects))
            tags = "".join(
                f"<object><name>{VOC_CLASSES[c]}</name><difficult>{d}</difficult></object>" for c, d in objects
            )
            _write(folder / "Annotations" / f"{number:06d}.xml", [f"<annotation>{tags}</annotation>"])
        _write(folder / "ImageSets/Main" / f"{split}.txt", truth)
        for c, name in enumerate(VOC_CLASSES):
            lines = []
            for image, objects in truth.items():
                difficult = [d for k, d in objects if k == c]
                lines.append(f"{image} {-1 if not difficult else 1 - min(difficult):2d}")
            _write(folder / "ImageSets/Main" / f"{name}_{split}.txt", lines)


def _dtd(root, painter):
    folder, lists = root / "dtd" / "dtd", {"train": [], "val": [], "test": []}
    for c, name in enumerate(("banded", "dotted", "zigzagged")):
        for i in range(18):
            path = f"{name}/{name}_{i + 2:04d}.jpg"
            painter.save(folder / "images" / path, c)
            lists[("train", "val", "test")[(i + c) % 3]].append(path)
    for split, lines in lists.items():
        _write(folder / "labels" / f"{split}1.txt", lines)


def _pets(root, painter):
    folder, lists = root / "oxford-iiit-pet", {"trainval": [], "test": []}
    for c, (name, kind) in enumerate((("Abyssinian", 1), ("american_bulldog", 2), ("Bengal", 1))):
        for i in range(26):
            painter.save(folder / "images" / f"{name}_{i + 1}.jpg", c)
            lists["test" if i % 4 == 3 else "trainval"].append(f"{name}_{i + 1} {c + 1} {kind} {c % 2 + 1}")
    for split, lines in lists.items():
        _write(folder / "annotations" / f"{split}.txt", lines)


def _caltech(root, painter):
    """Two classes with more than 30 images, one with fewer."""
    folder = root / "caltech101" / "101_ObjectCategories"
    for c, (name, count) in enumerate((("BACKGROUND_Google", 36), ("Faces", 38), ("accordion", 20))):
        for i in range(count):
            painter.save(folder / name / f"image_{i + 1:04d}.jpg", c)
    (folder / "BACKGROUND_Google" / "tmp").write_bytes(b"no picture, as in the real set")


def _flowers(root, painter):
    folder = root / "flowers-102"
    order = painter.rng.permutation(54) + 1
    labels = painter.rng.permutation(np.repeat([1, 2, 3], 18))
    for number, label in enumerate(labels, 1):
        painter.save(folder / "jpg" / f"image_{number:05d}.jpg", label - 1)
    ids = {"trnid": [], "valid": [], "tstid": []}
    for label in (1, 2, 3):
        members = [int(i) for i in order if labels[i - 1] == label]
        for name, chosen in zip(ids, (members[:5], members[5:10], members[10:]), strict=True):
            ids[name] += chosen
    _write_mat(folder / "imagelabels.mat", {"labels": labels.astype(np.uint8)[None]})
    _write_mat(folder / "setid.mat", {name: np.array(chosen, np.uint16)[None] for name, chosen in ids.items()})
