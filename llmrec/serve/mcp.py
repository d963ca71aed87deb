"""The Model Context Protocol (MCP) at ``/mcp``, with the same API keys; see `llmrec.serve.tools`."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import mcp_types as protocol
from fastapi import FastAPI, Request, Response
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from pydantic import ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from llmrec import __version__
from llmrec.errors import LlmrecError
from llmrec.guard import clean
from llmrec.serve.failures import validation_error_details
from llmrec.serve.service import Service
from llmrec.serve.tools import TOOLS, UNTRUSTED_DATA_WARNING, Past, Tool, check_items, one_line, supported_tools

log = logging.getLogger(__name__)

MCP_PATH = "/mcp"
_INSTRUCTIONS = (
    "A recommender over a closed catalogue. Items are named by their ids: find them with search_items. Identify the "
    f"user by a user id or a history of item ids. {UNTRUSTED_DATA_WARNING}"
)


def mount_mcp(app: FastAPI, service: Service) -> None:
    """Add the MCP endpoint ``/mcp`` to an application.

    Args:
        app: The application, from `llmrec.serve.app.make_app`.
        service: The service.
    """
    server, within = _make_mcp_server(service), app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[Any]:
        # Stateless: no client data are kept, so any process can answer the next request.
        manager = StreamableHTTPSessionManager(server, stateless=True)
        async with within(application) as state, manager.run():
            application.state.mcp = manager
            yield state

    async def mcp(request: Request) -> Response:
        return _ForwardedResponse(request.app.state.mcp.handle_request)

    app.router.lifespan_context = lifespan
    # A GET would open a stream without messages; the protocol allows rejecting it.
    app.add_api_route(MCP_PATH, mcp, methods=["POST"], include_in_schema=False, response_model=None)


class _ForwardedResponse(Response):
    """A response that is written by another ASGI application, after authentication."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _make_mcp_server(service: Service) -> Server[Any]:
    async def tools(_: Any, __: protocol.PaginatedRequestParams | None) -> protocol.ListToolsResult:
        return protocol.ListToolsResult(tools=[_tool_definition(tool) for tool in supported_tools(service)])

    async def call(_: Any, params: protocol.CallToolRequestParams) -> protocol.CallToolResult:
        if params.name not in TOOLS:
            raise MCPError(protocol.INVALID_PARAMS, f"unknown tool {clean(params.name, 60)!r}")
        return await run_tool(service, TOOLS[params.name], params.arguments or {})

    return Server("llmrec", version=__version__, instructions=_INSTRUCTIONS, on_list_tools=tools, on_call_tool=call)


def _tool_definition(tool: Tool) -> protocol.Tool:
    """Return the description of a tool."""
    return protocol.Tool(
        name=tool.name,
        description=f"{tool.about} {UNTRUSTED_DATA_WARNING}",
        input_schema=tool.arguments.model_json_schema(),
        output_schema=tool.answer.model_json_schema(mode="serialization"),
        annotations=protocol.ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False),
    )


async def run_tool(service: Service, tool: Tool, arguments: Mapping[str, Any]) -> protocol.CallToolResult:
    """Call a tool; errors that an agent can fix are returned as results, so that it can retry."""
    try:
        request = tool.arguments.model_validate(arguments)
        check_items(service, request)
        result = (await tool.call(service, request)).model_dump(mode="json", exclude_none=True)
    except ValidationError as error:
        where, message = validation_error_details(error, Past)
        return _error_result(f"{where or 'the arguments'}: {message}")
    except LlmrecError as error:
        return _error_result(str(error))
    except Exception:
        log.exception("unexpected error in a tool")
        return _error_result("internal error; see the log of the service")
    text = json.dumps(result, ensure_ascii=False)
    return protocol.CallToolResult(content=[protocol.TextContent(text=text)], structured_content=result)


def _error_result(why: str) -> protocol.CallToolResult:
    return protocol.CallToolResult(content=[protocol.TextContent(text=one_line(why, 1000))], is_error=True)
