/* ncclCommGetAsyncError with NCCL's signature (nccl.h). A communicator of this library is what the test keeps there. */

struct ncclComm {
    int error;  /* what the call finds */
    int result; /* what it returns */
    int calls;
};

int ncclCommGetAsyncError(struct ncclComm *comm, int *asyncError)
{
    comm->calls++;
    *asyncError = comm->error + OFFSET; /* 0, but in a library that must not be asked */
    return comm->result;
}
