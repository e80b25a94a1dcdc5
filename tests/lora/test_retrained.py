"""An adapter's own rows of a table, apart from any model."""

from __future__ import annotations

import torch

from loratune.lora.retrained import OwnRows


def own() -> OwnRows:
    return OwnRows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [5, 2])


def test_each_row_goes_to_its_token() -> None:
    table = own().put_into(torch.zeros(6, 2, dtype=torch.bfloat16))
    assert table.dtype == torch.bfloat16
    assert table[5].tolist() == [1, 2]
    assert table[2].tolist() == [3, 4]
    assert table[[0, 1, 3, 4]].abs().max() == 0


def test_only_the_rows_are_kept_in_a_state() -> None:
    rows = own()
    assert list(rows.state_dict()) == ["rows"]
    rows.load_state_dict({"rows": torch.full((2, 2), 7.0)})
    assert rows.rows.tolist() == [[7, 7], [7, 7]]


def test_a_state_of_the_base_alone_leaves_them() -> None:
    rows = own()
    rows.load_state_dict({}, strict=True)
    assert rows.rows.tolist() == [[1, 2], [3, 4]]
