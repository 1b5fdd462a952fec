// SPDX-License-Identifier: GPL-2.0-only
/*
 * Requests, on the queues for them, and the calls that make them.
 *
 * A request belongs to two parties, who waits for it and the device; the
 * buffers live until both have let go, so a waiter that is killed leaves
 * nothing behind that the device could write to.
 */
#include "guard.h"

#include <linux/build_bug.h>
#include <linux/cpu.h>
#include <linux/delay.h>
#include <linux/err.h>
#include <linux/export.h>
#include <linux/mm.h>
#include <linux/ratelimit.h>
#include <linux/refcount.h>
#include <linux/scatterlist.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/vmalloc.h>

/* Of a range and of a rule for MSRs, in requests and in answers. */
#define GUARD_ENTRY_LEN		sizeof(struct virtio_guard_range)

/* No request is longer, and no answer: its header is larger. */
#define GUARD_MAX_LEN		(sizeof(struct virtio_guard_kernel_resp) + \
				 2 * VIRTIO_GUARD_TOLD_MAX * GUARD_ENTRY_LEN)
#define GUARD_MAX_SG		DIV_ROUND_UP(GUARD_MAX_LEN, PAGE_SIZE)

static_assert(sizeof(struct virtio_guard_req) == 8);
static_assert(sizeof(struct virtio_guard_range) == 24);
static_assert(sizeof(struct virtio_guard_msr) == GUARD_ENTRY_LEN);
static_assert(sizeof(struct virtio_guard_msr_bitmap) == 16);
static_assert(sizeof(struct virtio_guard_resp) == 16);
static_assert(sizeof(struct virtio_guard_kernel_req) == 40);
static_assert(sizeof(struct virtio_guard_kernel_resp) == 120);
/* Both kinds begin alike. */
static_assert(offsetof(struct virtio_guard_kernel_req, count) ==
	      offsetof(struct virtio_guard_req, count));
static_assert(offsetof(struct virtio_guard_kernel_resp, value) ==
	      offsetof(struct virtio_guard_resp, value));
static_assert(GUARD_MAX_RANGES <= 2 * VIRTIO_GUARD_TOLD_MAX);

/* EBUSY: an emulated device is at work there; 10 + 20 + ... + 320 ms. */
#define GUARD_BUSY_RETRIES	6
#define GUARD_BUSY_DELAY_MS	10

/* Say so when the host has not answered for this long; then wait on. */
#define GUARD_PATIENCE		(30 * HZ)

/**
 * struct guard_ask - what is to be asked
 * @type: VIRTIO_GUARD_T_*
 * @count: how many entries, or bitmaps
 * @ranges: the entries, of a type that is about pages
 * @msrs: the entries, of a type that is about MSRs
 * @bytes: what follows the header as it is, if not entries
 * @len: of @bytes
 * @kernel: the header, of the type that has one of its own, but for what all have
 * @room: entries that the answer may have
 */
struct guard_ask {
	u16 type;
	u32 count;
	const struct guard_range *ranges;
	const struct guard_msr *msrs;
	const void *bytes;
	size_t len;
	const struct virtio_guard_kernel_req *kernel;
	u32 room;
};

/**
 * struct guard_request - one request
 * @node: in guard_queue.requests while the device has it
 * @ref: held by who waits and by the device
 * @done: the device, or its end, has answered
 * @err: the answer; valid once @done, as all of the following
 * @index: the entry that @err is about
 * @value: type-specific
 * @answered: entries that follow the answer
 * @queue: where it goes
 * @req: what the device reads, kvmalloc()ed
 * @req_len: its length
 * @resp: what the device writes, kvmalloc()ed
 * @resp_len: its length
 * @head_len: of which are no entries
 */
struct guard_request {
	struct list_head node;
	refcount_t ref;
	struct completion done;
	int err;
	u32 index;
	u64 value;
	u32 answered;
	enum guard_queue_id queue;
	struct virtio_guard_req *req;
	size_t req_len;
	struct virtio_guard_resp *resp;
	size_t resp_len;
	size_t head_len;
};

static void guard_request_put(struct guard_request *r)
{
	if (refcount_dec_and_test(&r->ref)) {
		kvfree(r->req);
		kvfree(r->resp);
		kfree(r);
	}
}

static void guard_put_ranges(struct virtio_guard_range *to,
			     const struct guard_range *from, u32 count)
{
	u32 i;

	for (i = 0; i < count; i++) {
		to[i].gfn_start = cpu_to_le64(from[i].gfn_start);
		to[i].gfn_end = cpu_to_le64(from[i].gfn_end);
		to[i].attributes = cpu_to_le64(from[i].attributes);
	}
}

static void guard_put_msrs(struct virtio_guard_msr *to,
			   const struct guard_msr *from, u32 count)
{
	u32 i;

	for (i = 0; i < count; i++) {
		to[i].first = cpu_to_le32(from[i].first);
		to[i].last = cpu_to_le32(from[i].last);
		to[i].access = cpu_to_le16(from[i].access);
		to[i].action = cpu_to_le16(from[i].action);
		to[i].flags = cpu_to_le32(from[i].flags);
		to[i].mask = cpu_to_le64(from[i].mask);
	}
}

static struct guard_request *guard_request_new(const struct guard_ask *ask)
{
	size_t head = ask->kernel ? sizeof(*ask->kernel) :
				    sizeof(struct virtio_guard_req);
	size_t len = ask->bytes ? ask->len : ask->count * GUARD_ENTRY_LEN;
	struct guard_request *r;
	void *entries;

	r = kzalloc(sizeof(*r), GFP_KERNEL);
	if (!r)
		return NULL;
	refcount_set(&r->ref, 1);
	init_completion(&r->done);
	r->index = VIRTIO_GUARD_NO_INDEX;

	r->queue = ask->kernel ? GUARD_QUEUE_WALK : GUARD_QUEUE_CONTROL;
	r->req_len = head + len;
	r->req = kvmalloc(r->req_len, GFP_KERNEL);
	/* Zeroed: the device may claim to have written what it did not. */
	r->head_len = ask->kernel ? sizeof(struct virtio_guard_kernel_resp) :
				    sizeof(*r->resp);
	r->resp_len = r->head_len + ask->room * GUARD_ENTRY_LEN;
	r->resp = kvzalloc(r->resp_len, GFP_KERNEL);
	if (!r->req || !r->resp) {
		guard_request_put(r);
		return NULL;
	}

	if (ask->kernel)
		memcpy(r->req, ask->kernel, head);
	else
		r->req->flags = 0;
	r->req->type = cpu_to_le16(ask->type);
	r->req->count = cpu_to_le32(ask->count);
	entries = (void *)r->req + head;
	if (ask->bytes)
		memcpy(entries, ask->bytes, len);
	else if (ask->msrs)
		guard_put_msrs(entries, ask->msrs, ask->count);
	else
		guard_put_ranges(entries, ask->ranges, ask->count);
	return r;
}

/* @sg has GUARD_MAX_SG entries, which is enough for any request or answer. */
static void guard_request_sg(void *at, size_t left, struct scatterlist *sg)
{
	unsigned int i;

	if (!is_vmalloc_addr(at)) {
		sg_init_one(sg, at, left);
		return;
	}
	sg_init_table(sg, DIV_ROUND_UP(left, PAGE_SIZE));
	for (i = 0; left; i++) {
		size_t part = min_t(size_t, left, PAGE_SIZE);

		sg_set_page(&sg[i], vmalloc_to_page(at), part, 0);
		at += part;
		left -= part;
	}
}

/* The request is over; the device's share of it ends here. */
static void guard_request_end(struct guard *guard, struct guard_request *r,
			      int err)
{
	lockdep_assert_held(&guard->lock);

	list_del(&r->node);
	r->err = err;
	guard->completed++;
	complete(&r->done);
	guard_request_put(r);
}

/* What the device wrote, read once. */
static int guard_request_answer(struct guard_request *r, unsigned int len)
{
	u32 status;

	if (len < r->head_len || len > r->resp_len)
		return -EIO;
	status = le32_to_cpu(READ_ONCE(r->resp->status));
	r->index = le32_to_cpu(READ_ONCE(r->resp->index));
	r->value = le64_to_cpu(READ_ONCE(r->resp->value));
	r->answered = (len - r->head_len) / GUARD_ENTRY_LEN;
	return status <= MAX_ERRNO ? -(int)status : -EIO;
}

static void guard_take_answers(struct guard *guard, struct virtqueue *vq)
{
	struct guard_request *r;
	unsigned int len;

	do {
		virtqueue_disable_cb(vq);
		while ((r = virtqueue_get_buf(vq, &len)))
			guard_request_end(guard, r,
					  guard_request_answer(r, len));
	} while (!virtqueue_is_broken(vq) && !virtqueue_enable_cb(vq));
}

/**
 * guard_answer_work - take the answers that are there
 * @work: guard.answer_work
 */
void guard_answer_work(struct work_struct *work)
{
	struct guard *guard = container_of(work, struct guard, answer_work);
	unsigned int i;

	mutex_lock(&guard->lock);
	for (i = 0; guard->live && i < GUARD_QUEUES; i++)
		if (guard->queues[i].vq)
			guard_take_answers(guard, guard->queues[i].vq);
	mutex_unlock(&guard->lock);
	wake_up_all(&guard->room);
}

/**
 * guard_requests_abort - end all requests that the device has
 * @guard: the device, which has been reset
 */
void guard_requests_abort(struct guard *guard)
{
	struct guard_request *r, *next;
	unsigned int i;

	lockdep_assert_held(&guard->lock);

	for (i = 0; i < GUARD_QUEUES; i++)
		list_for_each_entry_safe(r, next, &guard->queues[i].requests,
					 node)
			guard_request_end(guard, r, -ENODEV);
	guard->completed++;
}

/* Give it to the device; waits for room in the queue. */
static int guard_submit(struct guard *guard, struct guard_request *r)
{
	struct guard_queue *queue = &guard->queues[r->queue];
	struct scatterlist *sgs[2], *out, *in;
	unsigned long seen;
	int err;

	out = kmalloc_array(2 * GUARD_MAX_SG, sizeof(*out), GFP_KERNEL);
	if (!out)
		return -ENOMEM;
	in = out + GUARD_MAX_SG;
	guard_request_sg(r->req, r->req_len, out);
	guard_request_sg(r->resp, r->resp_len, in);
	sgs[0] = out;
	sgs[1] = in;

	for (;;) {
		mutex_lock(&guard->lock);
		seen = guard->completed;
		if (!guard->live)
			err = -ENODEV;
		else if (!queue->vq)
			err = -EOPNOTSUPP;
		else
			err = virtqueue_add_sgs(queue->vq, sgs, 1, 1, r,
						GFP_KERNEL);
		if (!err) {
			refcount_inc(&r->ref);
			list_add_tail(&r->node, &queue->requests);
			virtqueue_kick(queue->vq);
		} else if (err == -ENOSPC && list_empty(&queue->requests)) {
			/* The queue is empty and still too small. */
			err = -EIO;
		}
		mutex_unlock(&guard->lock);

		if (err != -ENOSPC)
			break;
		if (wait_event_killable(guard->room,
				READ_ONCE(guard->completed) != seen)) {
			err = -EINTR;
			break;
		}
	}
	kfree(out);
	return err;
}

static int guard_wait(struct guard_request *r)
{
	long left;

	for (;;) {
		left = wait_for_completion_killable_timeout(&r->done,
							    GUARD_PATIENCE);
		if (left)
			break;
		pr_warn_ratelimited("still waiting for the host; is vhost-guard running?\n");
	}
	return left < 0 ? -EINTR : r->err;
}

/*
 * The request, carried out and answered, be it with an error (its err), which the
 * caller has to put; or why there is no answer.
 */
static struct guard_request *guard_ask_once(struct guard *guard,
					    const struct guard_ask *ask)
{
	struct guard_request *r;
	int err;

	r = guard_request_new(ask);
	if (!r)
		return ERR_PTR(-ENOMEM);

	err = guard_submit(guard, r);
	if (!err && guard_wait(r) == -EINTR)
		/* The device may still be writing the answer. */
		err = -EINTR;
	if (!err)
		return r;
	guard_request_put(r);
	return ERR_PTR(err);
}

static struct guard_request *guard_ask(struct guard *guard,
				       const struct guard_ask *ask)
{
	struct guard_request *r;
	unsigned int tries;

	for (tries = 0;; tries++) {
		r = guard_ask_once(guard, ask);
		if (IS_ERR(r) || r->err != -EBUSY || tries == GUARD_BUSY_RETRIES)
			return r;
		msleep(GUARD_BUSY_DELAY_MS << tries);
		if (fatal_signal_pending(current))
			return r;
		guard_request_put(r);
	}
}

/* What changes something: the value of the answer is the generation. */
static int guard_ask_generation(const struct guard_ask *ask, u32 *index,
				u64 *generation)
{
	struct guard_request *r;
	struct guard *guard;
	int err = 0;

	might_sleep();
	*index = VIRTIO_GUARD_NO_INDEX;
	*generation = 0;

	guard = guard_get();
	if (!guard)
		return -ENODEV;
	if (!ask->count && ask->type != VIRTIO_GUARD_T_SEAL) {
		err = -EINVAL;
	} else if (ask->count > guard->max_request_ranges) {
		err = -E2BIG;
	} else {
		r = guard_ask(guard, ask);
		if (IS_ERR(r)) {
			err = PTR_ERR(r);
		} else {
			err = r->err;
			*index = r->index;
			if (!err)
				*generation = r->value;
			guard_request_put(r);
		}
	}
	guard_put(guard);
	return err;
}

/**
 * virtio_guard_lock - deny accesses to guest pages until the next system reset
 * @ranges: the pages, and what is denied or watched
 * @count: entries in @ranges
 * @index: out: the entry that an error is about, or %VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation that the lock belongs to; 0 on error
 *
 * Adds to what holds on the pages already. All of the ranges are locked or, on
 * error, none. Once this returns 0, every vCPU and every emulated device is
 * bound by it; nothing in the guest can take it back. May sleep, for as long as
 * the host takes to answer.
 *
 * Return: 0; -ENODEV without a device; -E2BIG when @count is more than one
 * request may have; -EINTR when the task is being killed, in which case the
 * request may still be carried out; or the errno that the device answered, see
 * docs/device.md.
 */
int virtio_guard_lock(const struct guard_range *ranges, u32 count, u32 *index,
		      u64 *generation)
{
	const struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_LOCK,
		.count = count,
		.ranges = ranges,
	};

	return guard_ask_generation(&ask, index, generation);
}
EXPORT_SYMBOL_GPL(virtio_guard_lock);

/**
 * virtio_guard_protect - deny accesses to guest pages, for as long as wanted
 * @ranges: the pages, and what is denied or watched there; 0 frees them
 * @count: entries in @ranges
 * @index: out: the entry that an error is about, or %VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation in which it holds; 0 on error
 *
 * Takes the place of what holds on the pages already. All of the ranges or, on
 * error, none. Protects from mistakes and from those who cannot call this; the
 * same call takes it back, until the pages are locked or sealed.
 *
 * Return: as virtio_guard_lock(); -EPERM when it would take something back from
 * pages that are locked or sealed.
 */
int virtio_guard_protect(const struct guard_range *ranges, u32 count,
			 u32 *index, u64 *generation)
{
	const struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_PROTECT,
		.count = count,
		.ranges = ranges,
	};

	return guard_ask_generation(&ask, index, generation);
}
EXPORT_SYMBOL_GPL(virtio_guard_protect);

/**
 * virtio_guard_seal - make what is protected now last until system reset
 * @generation: out: the generation in which it holds; 0 on error
 *
 * Rules for MSRs, too. Pages that get attributes later can still be freed.
 *
 * Return: as virtio_guard_lock().
 */
int virtio_guard_seal(u64 *generation)
{
	const struct guard_ask ask = { .type = VIRTIO_GUARD_T_SEAL };
	u32 index;

	return guard_ask_generation(&ask, &index, generation);
}
EXPORT_SYMBOL_GPL(virtio_guard_seal);

static struct guard_request *guard_ask_query(const struct guard_ask *ask)
{
	struct guard *guard;
	struct guard_request *r;
	int err;

	might_sleep();
	guard = guard_get();
	if (!guard)
		return ERR_PTR(-ENODEV);
	r = guard_ask(guard, ask);
	guard_put(guard);
	if (!IS_ERR(r) && r->err) {
		err = r->err;
		guard_request_put(r);
		return ERR_PTR(err);
	}
	return r;
}

/* The entries of the answer, to where there is room for that many. */
static void guard_get_ranges(struct guard_range *to,
			     const struct guard_request *r)
{
	const struct virtio_guard_range *from =
		(const void *)r->resp + r->head_len;
	u32 i;

	for (i = 0; i < r->answered; i++) {
		to[i].gfn_start = le64_to_cpu(READ_ONCE(from[i].gfn_start));
		to[i].gfn_end = le64_to_cpu(READ_ONCE(from[i].gfn_end));
		to[i].attributes = le64_to_cpu(READ_ONCE(from[i].attributes));
	}
}

/* As many entries as there are, or as there was room for; nothing else. */
static int guard_query_take(const struct guard_request *r,
			    struct guard_range *ranges, u32 room)
{
	if (r->answered != min_t(u64, r->value, room))
		return -EIO;
	guard_get_ranges(ranges, r);
	return 0;
}

/**
 * virtio_guard_query - what holds on guest pages
 * @gfn_start: the first page
 * @gfn_end: the last page
 * @ranges: out: the pages that have attributes, sorted and disjoint
 * @count: in: entries that @ranges has room for; out: entries filled, at most
 *         4096; 0 on error
 * @total: out: how many there are; 0 on error
 *
 * Return: as virtio_guard_lock().
 */
int virtio_guard_query(u64 gfn_start, u64 gfn_end, struct guard_range *ranges,
		       u32 *count, u64 *total)
{
	const struct guard_range all = { gfn_start, gfn_end, 0 };
	const struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_QUERY,
		.count = 1,
		.ranges = &all,
		.room = min_t(u32, *count, GUARD_MAX_RANGES),
	};
	struct guard_request *r;
	int err;

	*count = 0;
	*total = 0;
	r = guard_ask_query(&ask);
	if (IS_ERR(r))
		return PTR_ERR(r);
	err = guard_query_take(r, ranges, ask.room);
	if (!err) {
		*count = r->answered;
		*total = r->value;
	}
	guard_request_put(r);
	return err;
}
EXPORT_SYMBOL_GPL(virtio_guard_query);

/*
 * Pins keep what each CPU has in its MSRs now. A CPU that is coming up has half
 * of what it needs in them, and would never get the rest.
 */
static int guard_ask_msrs(const struct guard_ask *ask, u32 *index,
			  u64 *generation)
{
	int err;

	cpus_read_lock();
	err = guard_ask_generation(ask, index, generation);
	cpus_read_unlock();
	return err;
}

/**
 * virtio_guard_msr_lock - rules for MSRs, until the next system reset
 * @rules: what is to happen to accesses to MSRs, see docs/msr.md
 * @count: entries in @rules
 * @index: out: the entry that an error is about, or %VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation in which it holds; 0 on error
 *
 * Adds to the rules that hold already. All of them or, on error, none. Once this
 * returns 0, every vCPU is bound by them. CPUs neither come nor go meanwhile:
 * not to be called by what brings them up or down.
 *
 * Return: as virtio_guard_lock(); -EOPNOTSUPP with no @index when the host has
 * no rules for MSRs.
 */
int virtio_guard_msr_lock(const struct guard_msr *rules, u32 count, u32 *index,
			  u64 *generation)
{
	const struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_MSR_LOCK,
		.count = count,
		.msrs = rules,
	};

	return guard_ask_msrs(&ask, index, generation);
}
EXPORT_SYMBOL_GPL(virtio_guard_msr_lock);

/**
 * virtio_guard_msr_protect - rules for MSRs, for as long as wanted
 * @rules: what is to happen to accesses to MSRs; no action: allow
 * @count: entries in @rules
 * @index: out: the entry that an error is about, or %VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation in which it holds; 0 on error
 *
 * Takes the place of the rules that hold for the same MSRs and accesses.
 *
 * Return: as virtio_guard_msr_lock(); -EPERM when it would loosen a rule that
 * is locked or sealed.
 */
int virtio_guard_msr_protect(const struct guard_msr *rules, u32 count,
			     u32 *index, u64 *generation)
{
	const struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_MSR_PROTECT,
		.count = count,
		.msrs = rules,
	};

	return guard_ask_msrs(&ask, index, generation);
}
EXPORT_SYMBOL_GPL(virtio_guard_msr_protect);

/**
 * guard_msr_bitmap - as virtio_guard_msr_protect(), with bitmaps
 * @bitmaps: each a struct virtio_guard_msr_bitmap and its bytes
 * @bytes: how many bytes they are, at most %GUARD_BITMAPS_LEN
 * @count: how many bitmaps they are
 * @index: out: the bitmap that an error is about, or %VIRTIO_GUARD_NO_INDEX
 * @generation: out: the generation in which it holds; 0 on error
 *
 * Return: as virtio_guard_msr_protect().
 */
int guard_msr_bitmap(const void *bitmaps, size_t bytes, u32 count, u32 *index,
		     u64 *generation)
{
	const struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_MSR_BITMAP,
		.count = count,
		.bytes = bitmaps,
		.len = bytes,
	};

	return guard_ask_msrs(&ask, index, generation);
}

static int guard_msr_query_take(const struct guard_request *r,
				struct guard_msr *rules, u32 room)
{
	const struct virtio_guard_msr *entry = (const void *)(r->resp + 1);
	u32 i;

	if (r->answered != min_t(u64, r->value, room))
		return -EIO;
	for (i = 0; i < r->answered; i++) {
		rules[i].first = le32_to_cpu(READ_ONCE(entry[i].first));
		rules[i].last = le32_to_cpu(READ_ONCE(entry[i].last));
		rules[i].access = le16_to_cpu(READ_ONCE(entry[i].access));
		rules[i].action = le16_to_cpu(READ_ONCE(entry[i].action));
		rules[i].flags = le32_to_cpu(READ_ONCE(entry[i].flags));
		rules[i].mask = le64_to_cpu(READ_ONCE(entry[i].mask));
	}
	return 0;
}

/**
 * virtio_guard_msr_query - the guest's rules for MSRs
 * @first: the first MSR
 * @last: the last MSR
 * @access: of reads, writes or both: VIRTIO_GUARD_MSR_*
 * @rules: out: the rules that hold, sorted by MSR
 * @count: in: entries that @rules has room for; out: entries filled, at most
 *         4096; 0 on error
 * @total: out: how many there are; 0 on error
 *
 * Return: as virtio_guard_msr_lock().
 */
int virtio_guard_msr_query(u32 first, u32 last, u16 access,
			   struct guard_msr *rules, u32 *count, u64 *total)
{
	const struct guard_msr all = {
		.first = first,
		.last = last,
		.access = access,
	};
	const struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_MSR_QUERY,
		.count = 1,
		.msrs = &all,
		.room = min_t(u32, *count, GUARD_MAX_RANGES),
	};
	struct guard_request *r;
	int err;

	*count = 0;
	*total = 0;
	r = guard_ask_query(&ask);
	if (IS_ERR(r))
		return PTR_ERR(r);
	err = guard_msr_query_take(r, rules, ask.room);
	if (!err) {
		*count = r->answered;
		*total = r->value;
	}
	guard_request_put(r);
	return err;
}
EXPORT_SYMBOL_GPL(virtio_guard_msr_query);

static void guard_get_counts(struct guard_kernel_counts *to,
			     const struct virtio_guard_kernel_resp *from)
{
	to->pages = le64_to_cpu(READ_ONCE(from->pages));
	to->unmapped = le64_to_cpu(READ_ONCE(from->unmapped));
	to->not_written = le64_to_cpu(READ_ONCE(from->not_written));
	to->not_executed = le64_to_cpu(READ_ONCE(from->not_executed));
	to->write_exec = le64_to_cpu(READ_ONCE(from->write_exec));
	to->given = le64_to_cpu(READ_ONCE(from->given));
	to->elsewhere = le64_to_cpu(READ_ONCE(from->elsewhere));
	to->ranges = le64_to_cpu(READ_ONCE(from->ranges));
	to->mappings = le64_to_cpu(READ_ONCE(from->mappings));
	to->reserved = le64_to_cpu(READ_ONCE(from->reserved));
	to->outside = le64_to_cpu(READ_ONCE(from->outside));
	to->tables = le64_to_cpu(READ_ONCE(from->tables));
	to->told = le64_to_cpu(READ_ONCE(from->told));
}

/**
 * virtio_guard_protect_kernel - deny what the kernel's page tables do not use
 * @kernel: what is asked, and what the host says
 *
 * Has the host read the page tables that are loaded now, for the kernel's half of
 * linear addresses, and set for each page those of its range's attributes that no
 * mapping is in need of: as virtio_guard_protect() does, or, with
 * %VIRTIO_GUARD_KERNEL_LOCK, as virtio_guard_lock(). All of the pages or, on
 * error, none; none with %VIRTIO_GUARD_KERNEL_DRY_RUN. Mappings of these pages
 * must not be made meanwhile: whoever makes some has to ask again.
 *
 * Return: as virtio_guard_lock(); -EACCES when there are pages that a policy
 * refuses, the first in @kernel->index; -EOPNOTSUPP without an index when the host
 * does not read page tables, or the guest's memory is encrypted.
 */
int virtio_guard_protect_kernel(struct virtio_guard_kernel *kernel)
{
	struct virtio_guard_kernel_req req = {
		.flags = cpu_to_le16(kernel->flags),
		.unmapped = kernel->unmapped,
		.write_exec = kernel->write_exec,
	};
	struct guard_ask ask = {
		.type = VIRTIO_GUARD_T_PROTECT_KERNEL,
		.count = kernel->count,
		.ranges = kernel->ranges,
		.kernel = &req,
		.room = min_t(u32, kernel->room, 2 * VIRTIO_GUARD_TOLD_MAX),
	};
	struct guard_request *r;
	struct mm_struct *mm;
	struct guard *guard;
	int err = 0;

	might_sleep();
	kernel->told_count = 0;
	kernel->index = VIRTIO_GUARD_NO_INDEX;
	kernel->generation = 0;
	memset(&kernel->counts, 0, sizeof(kernel->counts));

	guard = guard_get();
	if (!guard)
		return -ENODEV;
	if (!kernel->count)
		err = -EINVAL;
	else if (kernel->count > guard->max_request_ranges)
		err = -E2BIG;
	if (!err) {
		mm = guard_walk_begin(&req);
		if (IS_ERR(mm)) {
			err = PTR_ERR(mm);
		} else {
			r = guard_ask(guard, &ask);
			err = PTR_ERR_OR_ZERO(r);
			guard_walk_end(mm);
		}
	}
	guard_put(guard);
	if (err)
		return err;

	err = r->err;
	kernel->index = r->index;
	if (!err)
		kernel->generation = r->value;
	guard_get_counts(&kernel->counts, (const void *)r->resp);
	guard_get_ranges(kernel->told, r);
	kernel->told_count = r->answered;
	guard_request_put(r);
	return err;
}
EXPORT_SYMBOL_GPL(virtio_guard_protect_kernel);
