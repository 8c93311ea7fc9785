"""A client of the Gateway service, made from protos/ alone: lists the models and streams a completion.

Text goes to standard output, everything else to standard error. Exit status: 0; 1 for an error; 2 for wrong arguments;
130 after Ctrl-C.
"""

import argparse
import sys

import grpc
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

# The stubs, which protoc writes into this folder: see ../README.md.
from protos.v1 import common_pb2, gateway_pb2, gateway_pb2_grpc


def arguments() -> tuple[str, gateway_pb2.GenerateRequest]:
    """The gateway's address, and what is asked of Generate."""
    parser = argparse.ArgumentParser(description="Streams a completion from an Enginehouse gateway.")
    parser.add_argument("--gateway", default="127.0.0.1:8400", metavar="HOST:PORT", help="[%(default)s]")
    parser.add_argument("--model", required=True, metavar="NAME")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--token-ids", action="store_true", help='the prompt is token ids, such as "12 345"')
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="[%(default)s]")
    parser.add_argument("--seed", type=int, metavar="N", help="sample with it [take the most probable tokens]")
    args = parser.parse_args()
    try:
        request = gateway_pb2.GenerateRequest(model=args.model)
        if args.token_ids:
            request.token_ids.ids.extend(int(token) for token in args.prompt.split())
        else:
            request.text = args.prompt
        request.stopping.max_tokens = args.max_tokens
        request.sampling.temperature = 0 if args.seed is None else 1
        if args.seed is not None:
            request.sampling.seed = args.seed
    except ValueError as error:  # a number that does not fit its field, text that is no Unicode
        parser.error(str(error))
    return args.gateway, request


def list_models(gateway: gateway_pb2_grpc.GatewayStub) -> None:
    for model in gateway.ListModels(gateway_pb2.ListModelsRequest()).models:
        print(f"{model.name}: executors {model.ready_executors}, tokens at most {model.max_seq_len}", file=sys.stderr)


def generate(gateway: gateway_pb2_grpc.GatewayStub, request: gateway_pb2.GenerateRequest) -> None:
    """Prints text as it comes. Leaving this function, in whatever way, ends the call at the gateway too."""
    call = gateway.Generate(request)
    try:
        for response in call:
            print(response.text, end="", flush=True)
            if response.HasField("finish"):
                reason = common_pb2.FinishReason.Name(response.finish.reason)
                usage = response.usage
                print()
                print(f"{reason}: {usage.prompt_tokens} + {usage.completion_tokens} tokens", file=sys.stderr)
    finally:
        call.cancel()


def describe(error: grpc.RpcError) -> str:
    """The status, the reason in google.rpc.ErrorInfo if the service gave one, and the message."""
    status, info = rpc_status.from_call(error), ErrorInfo()
    reasons = [info.reason for detail in (status.details if status else ()) if detail.Unpack(info)]
    return f"{' '.join([error.code().name, *reasons])}: {error.details()}"


def main() -> int:
    address, request = arguments()
    try:
        with grpc.insecure_channel(address) as channel:
            gateway = gateway_pb2_grpc.GatewayStub(channel)
            list_models(gateway)
            generate(gateway, request)
    except grpc.RpcError as error:
        print(describe(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
