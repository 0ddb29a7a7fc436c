from posttrain.grading import slots


def contents(text):
    found = slots.boxes(text)
    return None if found is None else [slot.content for slot in found]


def test_boxes_are_balanced_and_outermost():
    assert contents(r"\boxed{\frac{1}{2}} and \boxed{b}") == [r"\frac{1}{2}", "b"]
    assert contents(r"\boxed{\boxed{ \boxed{1} }}") == ["1"]
    assert contents(r"\boxed{\boxed{1} + 1}") == [r"\boxed{1} + 1"]
    assert contents(r"\boxed{\{1,2\}}") == [r"\{1,2\}"]
    assert contents(r"no box, \boxedfoo{1}") == []
    assert contents(r"\boxed{1") is None
    assert contents(r"\boxed 1") is None


def test_visible_is_what_stands_outside_the_reasoning():
    assert slots.visible("plain") == "plain"
    assert slots.visible("a<think>b</think>c") == "ac"
    assert slots.visible("b</think>c") == "c"
    assert slots.visible("<THINK>b</Think >c") == "c"
    for text in ("<think>a", "a<think>", "<think>a</think>b</think>c", "</think><think>", "<think><think></think>"):
        assert slots.visible(text) is None, text


def test_comments_and_fences_go():
    assert slots.without_comments("a<!-- b -->c") == "ac"
    assert slots.without_comments("a```\nb\n```c") == "ac"
    assert slots.without_comments("a\n% b\nc") == "a\n\nc"
    assert slots.without_comments("a <!-- b") == "a "
    assert slots.without_comments("100% sure") == "100% sure"
