/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The guard device (docs/device.md).  With fake=1 on the command line no device is used and each lock "succeeds" without
 * locking anything: every test of enforcement must then FAIL, which is how one sees that it can.
 */
#include "guest.h"

#define EVENT_BUFFERS	16

struct guard guard;
u64 reply_ns;
static bool fake;
static struct config fake_config = { 1, 4096, DENY_ALL, MAX_REQ, 8192, 1, 0, 0, 0, 0, 0, DENY_ALL, 4096, 0 };
static struct request *request;
static struct response *response;
static struct event *event_page;

struct request *request_buffer(void)
{
	if (!request)
		request = alloc_pages((sizeof(*request) + (MAX_REQ + 1) * sizeof(struct range) + PAGE - 1) / PAGE);
	return request;
}

void guard_start(u64 features, bool events, void *control_used, void *events_used)
{
	if (fake)
		return;
	vdev_reset(&guard.dev);
	if (!vdev_negotiate(&guard.dev, features))
		fail("FEATURES_OK refused for 0x%lx", guard.dev.features);
	vq_setup(&guard.control, &guard.dev, 0, control_used);
	vq_setup(&guard.events, &guard.dev, 1, events_used);
	if (guard.dev.features & F_KERNEL)
		vq_setup(&guard.walk, &guard.dev, 2, NULL);
	vdev_ok(&guard.dev);
	if (events)
		post_events(EVENT_BUFFERS);
}

void guard_open(void)
{
	fake = opt_num("fake", 0);
	reply_ns = opt_num("timeout", 20) * 1000000000ull;
	response = alloc_page();
	event_page = alloc_page();
	if (fake) {
		diag("fake=1: nothing is really locked");
		return;
	}
	if (!vdev_find(&guard.dev, GUARD_ID, 0))
		fail("no guard device (virtio ID 63) %s", machine_mmio() ? "among those named" : "on PCI bus 0");
	if (!guard.dev.config || guard.dev.config_len < sizeof(struct config))
		fail("configuration space of %u bytes, not %u", guard.dev.config_len, (u32)sizeof(struct config));
	guard_start(F_VERSION_1 | F_GUARD, true, NULL, NULL);
	if ((guard.dev.features & (F_VERSION_1 | F_NOWRITE)) != (F_VERSION_1 | F_NOWRITE))
		fail("VERSION_1 and NOWRITE are not both offered: 0x%lx", guard.dev.offered);
}

static void config_read(u32 *to)
{
	for (u32 i = 0; i < sizeof(struct config) / 4; i++)
		to[i] = vdev_config(&guard.dev, i * 4, 4);
}

bool guard_has(u64 feature)
{
	return fake || guard.dev.features & feature;
}

/* Until two readings agree. */
struct config guard_config(void)
{
	struct config a, b;

	if (fake)
		return fake_config;
	for (u32 i = 0; i < 1000; i++) {
		config_read((u32 *)&a);
		config_read((u32 *)&b);
		if (!memcmp(&a, &b, sizeof(a)))
			return a;
	}
	fail("the configuration space is never twice the same");
}

u32 guard_send_sg(const struct sg *sg, u32 n)
{
	u32 head, len;
	int sent;

	if (fake)
		fail("needs a guard device");
	sent = vq_add(&guard.control, sg, n);
	if (sent < 0)
		fail("control queue full");
	vq_kick(&guard.control);
	if (!vq_wait(&guard.control, &head, &len, reply_ns))
		fail("no answer on the control queue in %lu s", reply_ns / 1000000000);
	if ((int)head != sent)
		fail("answer for descriptor %u, sent was %d", head, sent);
	return len;
}

u32 guard_send(const void *req, u32 len, struct response *resp)
{
	struct sg sg[2] = { { (u64)req, len, false }, { (u64)response, sizeof(*response), true } };
	u32 used;

	memset(response, 0xee, sizeof(*response));
	used = len ? guard_send_sg(sg, 2) : guard_send_sg(sg + 1, 1);
	*resp = *response;
	return used;
}

struct response guard_request(u16 type, u32 n)
{
	struct request *r = request_buffer();
	struct response resp;
	u32 used;

	r->type = type;
	r->flags = 0;
	r->count = n;
	if (fake) {
		fake_config.ranges_in_force += n;
		return (struct response) { 0, NO_INDEX, fake_config.generation };
	}
	used = guard_send(r, sizeof(*r) + n * sizeof(r->ranges[0]), &resp);
	check(used == sizeof(resp), "used length %u of the answer to a request of type %u, not 16", used, type);
	return resp;
}

struct response guard_lock_ranges(u32 n)
{
	return guard_request(LOCK, n);
}

struct response guard_lock(const void *page, u32 pages)
{
	request_buffer()->ranges[0] = (struct range) { gfn_of(page), gfn_of(page) + pages - 1, NOWRITE };
	return guard_lock_ranges(1);
}

struct response guard_protect(const void *page, u32 pages, u64 attr)
{
	request_buffer()->ranges[0] = (struct range) { gfn_of(page), gfn_of(page) + pages - 1, attr };
	return guard_request(PROTECT, 1);
}

void must_protect(const void *page, u64 attr)
{
	struct response r = guard_protect(page, 1, attr);

	if (r.status)
		fail("PROTECT of gpa 0x%lx, attributes 0x%lx: status %u, index 0x%x", (u64)page, attr, r.status, r.index);
	check(r.index == NO_INDEX, "index 0x%x in a response with status 0", r.index);
}

struct response guard_seal(void)
{
	return guard_request(SEAL, 0);
}

/* The answer is longer than others: header, then up to `room` entries. */
static struct response ask_many(u16 type, struct range of, struct range *to, u32 room, u32 *used_len)
{
	struct request *r = request_buffer();
	struct sg sg[3] = {
		{ (u64)r, sizeof(*r) + sizeof(r->ranges[0]), false }, { (u64)response, sizeof(*response), true },
		{ (u64)to, room * sizeof(*to), true },
	};

	if (fake) {
		*used_len = sizeof(*response);
		return (struct response) { 0, NO_INDEX, 0 };
	}
	r->type = type;
	r->flags = 0;
	r->count = 1;
	r->ranges[0] = of;
	memset(response, 0xee, sizeof(*response));
	*used_len = guard_send_sg(sg, room ? 3 : 2);
	return *response;
}

struct response guard_query(u64 first, u64 last, struct range *to, u32 room, u32 *used_len)
{
	return ask_many(QUERY, (struct range) { first, last, 0 }, to, room, used_len);
}

struct response guard_msr_query(struct msr_rule of, struct msr_rule *to, u32 room, u32 *used_len)
{
	struct range entry;

	memcpy(&entry, &of, sizeof(entry));
	return ask_many(MSR_QUERY, entry, (struct range *)to, room, used_len);
}

void need(u64 deny, u64 audit)
{
	struct config c = guard_config();

	if (deny & ~c.deny_bits)
		skip("this host does not enforce 0x%lx: deny bits 0x%lx", deny, c.deny_bits);
	if (audit & ~c.audit_bits)
		skip("this host cannot watch 0x%lx: audit bits 0x%lx", audit, c.audit_bits);
}

void must_lock(const void *page)
{
	struct response r = guard_lock(page, 1);

	if (r.status)
		fail("lock of gpa 0x%lx: status %u, index 0x%x", (u64)page, r.status, r.index);
	check(r.index == NO_INDEX, "index 0x%x in a response with status 0", r.index);
}

void post_event(void *buffer, u32 len)
{
	struct sg sg = { (u64)buffer, len, true };

	if (fake)
		return;
	if (vq_add(&guard.events, &sg, 1) < 0)
		fail("events queue full");
	vq_kick(&guard.events);
}

void post_events(u32 n)
{
	for (u32 i = 0; i < n; i++)
		post_event(&event_page[i], sizeof(struct event));
}

/* Takes an event and, if it used one of the standing buffers, posts that again. */
bool next_event(struct event *e, u32 *used_len, u64 timeout_ns)
{
	u32 head, len;
	struct event *at;

	if (fake || !vq_wait(&guard.events, &head, &len, timeout_ns))
		return false;
	at = (struct event *)guard.events.desc[head].addr;
	*e = *at;
	*used_len = len;
	if (at >= event_page && at < event_page + EVENT_BUFFERS) {
		memset(at, 0xee, sizeof(*at));
		post_event(at, sizeof(*at));
	}
	return true;
}

bool next_event_on(const void *page, struct event *e, u64 timeout_ns)
{
	u64 t = now_ns(), gone;
	u32 len;

	while ((gone = now_ns() - t) < timeout_ns && next_event(e, &len, timeout_ns - gone))
		if (e->gpa >> 12 == gfn_of(page))
			return true;
	return false;
}
