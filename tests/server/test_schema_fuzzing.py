"""Requests made from the served OpenAPI document: no answer is the server's fault, and none breaks its own schema."""

from fuzz import fuzz


def test_answers_to_made_up_requests_are_what_the_document_says(server):
    answers = list(fuzz(server.url, 250))
    assert [problem for _, problem in answers if problem] == []
    statuses = {name.rpartition(" ")[2] for name, _ in answers}
    assert {"200", "400", "404"} <= statuses, "right requests and wrong ones"
    assert len(answers) > 200
    server.wait_for(server.all_pages_are_free, what="freeing all pages")
