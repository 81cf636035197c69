"""The exact search against a whole product in float64."""

import numpy as np
import pytest
import torch

from hf_mm.pipelines import nearest
from hf_mm.pipelines.nearest import largest_products, precise_products


def cut(matrix: torch.Tensor, *lengths: int) -> list[np.ndarray]:
    return [piece.numpy() for piece in matrix.split(lengths)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, value in {"FIRST_ROWS": 4, "ROWS": 16, "PRODUCTS": 64, "TERMS": 24, "MANY_QUERIES": 4}.items():
        monkeypatch.setattr(nearest, name, value)


@pytest.mark.parametrize("num_queries", [1, 4, 11])
@pytest.mark.parametrize("count", [1, 3, 30, 100])
@pytest.mark.parametrize("lengths", [(100,), (1, 3, 50, 46), (10,) * 10])
def test_the_largest_products(num_queries, count, lengths):
    matrix, queries = torch.randn(100, 6), torch.randn(num_queries, 6)
    scores, rows = largest_products(queries, cut(matrix, *lengths), count)
    expected = (queries.double() @ matrix.double().T).topk(count)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(scores.double(), expected.values, atol=1e-5, rtol=1e-5)


def test_one_best_row_that_comes_last_is_found():
    matrix = torch.zeros(1000, 2)
    matrix[:, 0] = torch.linspace(0, 1, 1000)
    _, rows = largest_products(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), cut(matrix, 700, 300), 2)
    assert rows.tolist() == [[999, 998], [0, 1]]


@pytest.mark.parametrize("lengths", [(50,), (7, 43), (10,) * 5])
def test_precise_products_are_rounded_float64(lengths):
    matrix, queries = torch.randn(50, 6), torch.randn(3, 6)
    rows = torch.randint(50, (3, 20))
    exact = (queries.double() @ matrix.double().T).gather(1, rows)
    products = precise_products(queries, cut(matrix, *lengths), rows)
    assert products.dtype == torch.float32
    assert torch.equal(products, exact.float())


def test_equal_rows_have_equal_precise_products():
    """Wherever they stand, and however many queries and rows there are."""
    matrix = torch.nn.functional.normalize(torch.randn(1, 77), dim=-1).repeat(300, 1)
    queries = torch.randn(5, 77)
    pieces = cut(matrix, 7, 150, 143)
    many = precise_products(queries, pieces, torch.arange(300).repeat(5, 1))
    assert torch.equal(many, many[:, :1].expand_as(many))
    assert torch.equal(precise_products(queries[2:3], pieces, torch.tensor([[299]])), many[2:3, :1])
