"""What a teacher said is found again for the same image, and for no other."""

from __future__ import annotations

import pytest
import torch

from lightning_compress.core.distill.cache import TeacherCache, fingerprints


def images(count=8, seed=0):
    return torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))


def put(cache, x):
    cache.put(fingerprints(x), [x.mean((2, 3)), x.flatten(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [4, 5])
def test_a_fingerprint_is_that_of_the_content(dtype, size):
    x = (100 * images()[..., :size, :size].abs()).to(dtype)
    keys = fingerprints(x)
    assert keys.dtype == torch.int64
    assert len(set(keys.tolist())) == len(x)
    assert torch.equal(fingerprints(x.flip(0)), keys.flip(0))  # wherever it stands in the batch
    assert torch.equal(fingerprints(x.to(memory_format=torch.channels_last)), keys)
    assert not (fingerprints(x.flip(3)) == keys).any()


def test_images_of_few_grey_levels_do_not_collide():
    """Their numbers differ in a few high bits alone, where a plain sum of products is weak."""
    levels = torch.tensor([0.0, 0.25, 0.5, 0.75])
    digits = torch.arange(4**7)[:, None] // 4 ** torch.arange(7) % 4
    for x in (levels[digits], torch.cat([levels[digits], levels[digits[:, :1]]], 1)):  # odd and even lengths
        assert len(set(fingerprints(x).tolist())) == 4**7
    signs = 1.0 - 2 * (torch.arange(2**14)[:, None] >> torch.arange(14) & 1)
    assert len(set(fingerprints(signs).tolist())) == 2**14


def test_answers_in_the_order_of_the_question(tmp_path):
    cache, x = TeacherCache(tmp_path), images()
    assert cache.get(fingerprints(x)) is None
    put(cache, x)
    order = torch.tensor([3, 0, 3, 7])
    means, flat = cache.get(fingerprints(x[order]))
    assert torch.equal(means, x[order].mean((2, 3)))
    assert torch.equal(flat, x[order].flatten(1))
    assert cache.get(fingerprints(torch.cat([x[:1], images(1, seed=1)]))) is None
    assert (cache.asked, cache.known) == (8 + 4 + 2, 4 + 1)


def test_grows(tmp_path):
    cache = TeacherCache(tmp_path)
    for seed in range(9):
        put(cache, images(3, seed))
        put(cache, images(3, seed))
    assert len(cache) == 27
    for seed in range(9):
        assert torch.equal(cache.get(fingerprints(images(3, seed)))[1], images(3, seed).flatten(1))


def test_what_is_written_is_read_by_others_and_once(tmp_path):
    one, other = TeacherCache(tmp_path, rank=0), TeacherCache(tmp_path, rank=1)
    put(one, images(4, 0))
    put(other, images(4, 1))
    put(other, images(4, 0)[:2])  # both know these
    for cache in (one, other, one):
        cache.write()
    assert len(list(tmp_path.iterdir())) == 2
    for cache in (one, other, TeacherCache(tmp_path)):
        cache.read()
        assert len(cache) == 8
        for seed in (0, 1):
            assert torch.equal(cache.get(fingerprints(images(4, seed)))[1], images(4, seed).flatten(1))
    put(one, images(3, 2))
    one.write()
    other.read()
    assert len(other) == 11
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_file_is_named(tmp_path):
    cache = TeacherCache(tmp_path)
    put(cache, images())
    cache.write()
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"cache.*{file.name}.*Remove"):
        TeacherCache(tmp_path).read()
