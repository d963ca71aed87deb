"""Drive the page of a service's HTTP interface, ``/docs``, in a real Chromium: it loads, and a request can be tried.

    python -m tests.serve.page.drive_docs http://127.0.0.1:8000/ SHOTS [CHROMIUM] [--seconds 60] [--key KEY]

It needs ``pip install playwright`` and an installed Chromium. The page is Swagger UI, so the script does not
check colours and labels, only errors, violations of the content security policy and requests to other hosts.
"""

from __future__ import annotations

import sys

from tests.serve.page.drive import arguments, driving


def main() -> None:
    """Run all steps."""
    given = arguments("Drive the page of a service's HTTP interface.").parse_args()
    with driving(given) as drive:
        drive.ready = ".opblock"
        page = drive.open("docs")
        paths = page.request.get(drive.base + "openapi.json").json()["paths"]
        operations = sum(len(methods) for methods in paths.values())
        assert page.locator(".opblock").count() == operations, (page.locator(".opblock").count(), operations)
        page.screenshot(path=drive.shots / "1-docs.png", full_page=True)
        block = page.locator(".opblock", has=page.locator("[data-path='/v1/models']")).first
        block.locator(".opblock-summary-control").click()
        block.locator(".try-out__btn").click()
        block.locator(".execute").click()
        block.locator(".live-responses-table .response-col_status", has_text="200").first.wait_for()
        page.screenshot(path=drive.shots / "2-tried.png", full_page=True)
        assert page.evaluate("window.__violations") == [], page.evaluate("window.__violations")
    sys.stdout.write(f"all is well; {operations} operations are shown\n")


if __name__ == "__main__":
    main()
