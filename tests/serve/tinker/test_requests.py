"""The queue by itself: what is done with a result that cannot be noted, and what is kept of a request that has ended."""

import asyncio
import weakref

from posttrain.serve.tinker.requests import ComputeJob, ComputeQueue, RequestResult


def computed(*jobs):
    """The queue that computed them, in this order."""

    async def run():
        queue = ComputeQueue(1 << 20)
        queue.start()
        for job in jobs:
            queue.note(job)
            queue.submit(job)
        async with asyncio.timeout(30):
            for job in jobs:
                await job.ended.wait()
        await queue.close()
        return queue

    return asyncio.run(run())


def note_on_full_disk(outcome):
    with open("/dev/full", "w") as device:
        device.write("a line")


def test_a_result_that_cannot_be_noted_is_a_failure_and_the_next_request_is_computed():
    noted = ComputeJob("model:1", lambda: RequestResult({"path": "somewhere"}), note_on_full_disk)
    following = ComputeJob("model:2", lambda: RequestResult({"loss": 1.0}))
    computed(noted, following)
    assert noted.outcome.record is None
    assert "request model:1 was computed, but could not be noted: [Errno 28]" in noted.outcome.failure
    assert following.outcome == RequestResult({"loss": 1.0})


class Body:
    """What a client sent."""


def test_the_result_of_a_request_is_kept_and_its_body_is_not():
    one, other = Body(), Body()
    alive = [weakref.ref(one), weakref.ref(other)]
    alone = ComputeJob("model:1", lambda body=one: RequestResult(message=b"of one"))
    joined = ComputeJob("sampler:1", RequestResult, join=lambda all_: [RequestResult()] * len(all_), asked=other)
    del one, other
    queue = computed(alone, joined)
    assert queue.find("model:1").outcome.message == b"of one"
    assert [body() for body in alive] == [None, None]
