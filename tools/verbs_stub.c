// A libibverbs that does nothing but keep count, and complete what it is told to: what is left is what a binding, and
// Python, cost. See bench_verbs.py and bench_host_path.py.
#define _GNU_SOURCE
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#undef ibv_query_port
#undef ibv_reg_mr

struct queue { struct ibv_cq cq; unsigned head, tail; int is_armed; struct ibv_wc wc[4096]; };
static struct ibv_device device, *devices[2];
static struct ibv_qp *queue_pairs[4096];  // by number
static uint32_t next_number = 100;
static long num_posted;
static int completes_sends;

static void tell(struct ibv_cq *cq) {  // as a kernel does: an event is the queue's address
  uint64_t n;
  if (read(cq->channel->fd, &n, 8)) {}  // of one event after another that nobody has taken, one is left
  eventfd_write(cq->channel->fd, (uintptr_t)cq);
}
static void complete(struct ibv_cq *cq, struct ibv_wc wc) {
  struct queue *q = (struct queue *)cq;
  q->wc[q->tail++ & 4095] = wc;
  if (q->is_armed && cq->channel) q->is_armed = 0, tell(cq);
}
static int post_send(struct ibv_qp *qp, struct ibv_send_wr *wr, struct ibv_send_wr **bad) {
  for (; wr; wr = wr->next) {
    num_posted++;
    if (completes_sends && wr->send_flags & IBV_SEND_SIGNALED) complete(qp->send_cq, (struct ibv_wc){.opcode = IBV_WC_RDMA_WRITE, .qp_num = qp->qp_num});
  }
  return 0;
}
static int post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad) { return 0; }
static int post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad) { return 0; }
static int req_notify_cq(struct ibv_cq *cq, int solicited) { ((struct queue *)cq)->is_armed = 1; return 0; }
static int poll_cq(struct ibv_cq *cq, int most, struct ibv_wc *wc) {
  struct queue *q = (struct queue *)cq;
  int n = 0;
  for (; n < most && q->head != q->tail; n++) wc[n] = q->wc[q->head++ & 4095];
  return n;
}

long stub_num_posted(void) { return num_posted; }
void stub_complete_sends(void) { completes_sends = 1; }  // that ask for it, from now on
static void arrive(uint32_t number, uint32_t imm) {
  complete(queue_pairs[number]->recv_cq, (struct ibv_wc){.opcode = IBV_WC_RECV_RDMA_WITH_IMM, .wc_flags = IBV_WC_WITH_IMM, .qp_num = number, .imm_data = imm});
}
void stub_complete(unsigned n, uint32_t number) { while (n--) arrive(number, n); }  // so many immediates came
void stub_complete_each(unsigned n, const uint32_t *numbers, uint32_t imm) { while (n--) arrive(*numbers++, imm); }  // one from each

struct ibv_device **ibv_get_device_list(int *n) { devices[0] = &device; if (n) *n = 1; strcpy(device.name, "stub0"); return devices; }
void ibv_free_device_list(struct ibv_device **list) {}
const char *ibv_get_device_name(struct ibv_device *d) { return d->name; }
__be64 ibv_get_device_guid(struct ibv_device *d) { return 1; }
struct ibv_context *ibv_open_device(struct ibv_device *d) {
  struct ibv_context *c = calloc(1, sizeof *c + 4096);
  c->device = d, c->num_comp_vectors = 1;
  c->ops.post_send = post_send, c->ops.post_recv = post_recv, c->ops.poll_cq = poll_cq;
  c->ops.req_notify_cq = req_notify_cq, c->ops.post_srq_recv = post_srq_recv;
  return c;
}
int ibv_close_device(struct ibv_context *c) { return 0; }
int ibv_query_device(struct ibv_context *c, struct ibv_device_attr *a) { memset(a, 0, sizeof *a); return 0; }
int ibv_query_port(struct ibv_context *c, uint8_t port, struct _compat_ibv_port_attr *compat) {
  struct ibv_port_attr *a = (struct ibv_port_attr *)compat;
  a->state = IBV_PORT_ACTIVE, a->active_mtu = a->max_mtu = IBV_MTU_4096, a->gid_tbl_len = 1, a->link_layer = IBV_LINK_LAYER_ETHERNET;
  return 0;
}
int ibv_query_gid(struct ibv_context *c, uint8_t port, int i, union ibv_gid *g) { memset(g, 0, 16); g->raw[10] = g->raw[11] = 0xff; g->raw[12] = 10; return 0; }
struct ibv_pd *ibv_alloc_pd(struct ibv_context *c) { struct ibv_pd *p = calloc(1, sizeof *p); p->context = c; return p; }
int ibv_dealloc_pd(struct ibv_pd *p) { return 0; }
struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access) {
  struct ibv_mr *m = calloc(1, sizeof *m);
  m->addr = addr, m->length = length, m->lkey = 7, m->rkey = 9, m->pd = pd, m->context = pd->context;
  return m;
}
struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access) { return ibv_reg_mr(pd, addr, length, access); }
int ibv_dereg_mr(struct ibv_mr *m) { return 0; }
struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *c) { struct ibv_comp_channel *h = calloc(1, sizeof *h); h->context = c; h->fd = eventfd(0, EFD_NONBLOCK); return h; }
int ibv_destroy_comp_channel(struct ibv_comp_channel *h) { return 0; }
struct ibv_cq *ibv_create_cq(struct ibv_context *c, int n, void *context, struct ibv_comp_channel *channel, int vector) {
  struct queue *q = calloc(1, sizeof *q);
  q->cq.context = c, q->cq.cqe = n, q->cq.cq_context = context, q->cq.channel = channel;
  return &q->cq;
}
int ibv_destroy_cq(struct ibv_cq *q) { return 0; }
int ibv_get_cq_event(struct ibv_comp_channel *h, struct ibv_cq **c, void **x) {
  uint64_t n;
  if (read(h->fd, &n, 8) != 8) return -1;
  *c = (struct ibv_cq *)n, *x = (*c)->cq_context;
  return 0;
}
void ibv_ack_cq_events(struct ibv_cq *c, unsigned n) {}
struct ibv_qp *ibv_create_qp(struct ibv_pd *p, struct ibv_qp_init_attr *a) {
  struct ibv_qp *q = calloc(1, sizeof *q);
  q->context = p->context, q->pd = p, q->send_cq = a->send_cq, q->recv_cq = a->recv_cq, q->qp_type = a->qp_type;
  return queue_pairs[q->qp_num = next_number++ & 4095] = q;
}
int ibv_destroy_qp(struct ibv_qp *q) { return 0; }
int ibv_modify_qp(struct ibv_qp *q, struct ibv_qp_attr *a, int mask) { return 0; }
int ibv_query_qp(struct ibv_qp *q, struct ibv_qp_attr *a, int mask, struct ibv_qp_init_attr *i) { memset(a, 0, sizeof *a); return 0; }
struct ibv_srq *ibv_create_srq(struct ibv_pd *p, struct ibv_srq_init_attr *a) { struct ibv_srq *s = calloc(1, sizeof *s); s->context = p->context; return s; }
int ibv_destroy_srq(struct ibv_srq *s) { return 0; }
int ibv_modify_srq(struct ibv_srq *s, struct ibv_srq_attr *a, int mask) { return 0; }
int ibv_query_srq(struct ibv_srq *s, struct ibv_srq_attr *a) { return 0; }
struct ibv_ah *ibv_create_ah(struct ibv_pd *p, struct ibv_ah_attr *a) { return calloc(1, sizeof(struct ibv_ah)); }
int ibv_destroy_ah(struct ibv_ah *a) { return 0; }
int ibv_get_async_event(struct ibv_context *c, struct ibv_async_event *e) { return -1; }
void ibv_ack_async_event(struct ibv_async_event *e) {}
const char *ibv_event_type_str(enum ibv_event_type e) { return "?"; }
const char *ibv_wc_status_str(enum ibv_wc_status s) { return "?"; }
